"""The values that options may take: one list for the schema, the command line's help and the classes."""

PASSES = ("joint", "sequential", "shared")  # and `auto`
SOURCES = ("auto", "rows", "layerwise", "representation")  # of a balancer's Gramian
PRECISIONS = ("fp32", "bf16", "fp16")
WAYS = ("ddp", "fsdp", "hsdp")  # to distribute a model over several processes; and `auto`
ON_NONFINITE = ("error", "skip_task", "skip_step")
INTERVALS = ("step", "epoch")  # of a scheduler
TAILS = ("keep", "drop")  # what is done with an epoch's last, incomplete batch
OUTPUTS = ("logits", "multilabel_logits", "probabilities", "values", "log_values")  # what a prediction means
MEAN_OVER = ("samples", "elements", "positions")
SAMPLING = ("all", "round_robin", "proportional", "temperature")  # of several sources of data
LENGTHS = ("min", "max", "sum")  # of an epoch over several sources
SHAPES = ("linear", "cosine")  # of a weight that changes over the run
