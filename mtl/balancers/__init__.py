"""Balancers turn the tasks' losses and gradients into one weight a task."""

from mtl.balancers.aligned_mtl import AlignedMTL
from mtl.balancers.balancer import Balancer
from mtl.balancers.conflict_free import ConflictFree
from mtl.balancers.dualproj import DualProj
from mtl.balancers.equal import Equal
from mtl.balancers.fairgrad import FairGrad
from mtl.balancers.imtl_g import IMTLG
from mtl.balancers.mgda import MGDA
from mtl.balancers.nash_mtl import NashMTL
from mtl.balancers.pcgrad import PCGrad
from mtl.balancers.upgrad import UPGrad

__all__ = [
    "IMTLG",
    "MGDA",
    "AlignedMTL",
    "Balancer",
    "ConflictFree",
    "DualProj",
    "Equal",
    "FairGrad",
    "NashMTL",
    "PCGrad",
    "UPGrad",
]
