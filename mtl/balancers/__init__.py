"""Balancers, which compute a weight for each task from the tasks' losses and gradients."""

from mtl.balancers.aligned_mtl import AlignedMTL
from mtl.balancers.balancer import Balancer
from mtl.balancers.cagrad import CAGrad
from mtl.balancers.conflict_free import ConflictFree
from mtl.balancers.db_mtl import DBMTL
from mtl.balancers.dualproj import DualProj
from mtl.balancers.dwa import DWA
from mtl.balancers.equal import Equal
from mtl.balancers.excess_mtl import ExcessMTL
from mtl.balancers.fairgrad import FairGrad
from mtl.balancers.famo import FAMO
from mtl.balancers.gls import GLS
from mtl.balancers.graddrop import GradDrop
from mtl.balancers.gradnorm import GradNorm
from mtl.balancers.gradvac import GradVac
from mtl.balancers.imtl import IMTL
from mtl.balancers.imtl_g import IMTLG
from mtl.balancers.imtl_l import IMTLL
from mtl.balancers.mgda import MGDA
from mtl.balancers.moco import MoCo
from mtl.balancers.nash_mtl import NashMTL
from mtl.balancers.pcgrad import PCGrad
from mtl.balancers.rlw import RLW
from mtl.balancers.sdmgrad import SDMGrad
from mtl.balancers.si import SI
from mtl.balancers.stch import STCH
from mtl.balancers.torchjd import TorchJD
from mtl.balancers.upgrad import UPGrad
from mtl.balancers.uw import UW
from mtl.balancers.uw_so import UWSO

__all__ = [
    "DBMTL",
    "DWA",
    "FAMO",
    "GLS",
    "IMTL",
    "IMTLG",
    "IMTLL",
    "MGDA",
    "RLW",
    "SI",
    "STCH",
    "UW",
    "UWSO",
    "AlignedMTL",
    "Balancer",
    "CAGrad",
    "ConflictFree",
    "DualProj",
    "Equal",
    "ExcessMTL",
    "FairGrad",
    "GradDrop",
    "GradNorm",
    "GradVac",
    "MoCo",
    "NashMTL",
    "PCGrad",
    "SDMGrad",
    "TorchJD",
    "UPGrad",
]
