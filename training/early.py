"""What can be known of a run before its data are looked at, which may take minutes."""

import models
import teachers
from architectures.factory import has_published_weights, published_cfg
from augmentation.batch import build_train_transform
from augmentation.preprocessing import Preprocessing
from config import Config
from errors import OptionError
from optimization.optimizer import registered
from outputs.trackers.feed import check_installed

# Any: the names of policies don't depend on it.
_PREPROCESSING = Preprocessing(32, 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3)


def check_names(config: Config) -> None:
    """Raise OptionError or CheckpointError for a model, teacher, optimiser or policy that there
    isn't. Plug-ins must be imported."""
    name = models.resolve_name(config.model.model)
    if config.run.eval:
        return
    check_installed(config.log.log_to)
    # What timm's other sources have is fetched when it is needed.
    here = config.model.pretrained and not config.run.resume and ":" not in name
    if here and not has_published_weights(published_cfg(name)):
        raise OptionError("pretrained", f"no weights of {name} are published: leave it out")
    teachers.check_teacher(config.loss)
    registered(config.optim.opt)
    build_train_transform(_PREPROCESSING, config.augment, config.run.seed)
