"""Names of timm's registry that can be built without further packages."""

from timm.optim import get_optimizer_info, list_optimizers

PLAIN = [n for n in list_optimizers() if not n.startswith(("bnb", "fused", "adahessian"))]
# A name of each class.
CLASSES = set({get_optimizer_info(name).opt_class: name for name in reversed(PLAIN)}.values())
# Those of the same class that keep another state, and Lookahead around some; without Kron, which
# compiles for minutes.
VARIANTS = ["lookahead_adamw", "lookahead_lion", "cadamw", "nadamuon", "lambcw", "adafactorbvc"]
FAMILIES = sorted(CLASSES - {"kron"}) + VARIANTS
