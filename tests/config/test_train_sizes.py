"""config/train_sizes.py: which size training images have in which epoch."""

import pytest

from config import ModelOptions
from config.train_sizes import stages, train_size
from errors import OptionError


def test_a_stage_goes_on_until_the_next_one_begins():
    assert stages(("128:0", "96x160:2")) == ((0, (128, 128)), (2, (96, 160)))
    model = ModelOptions(train_sizes=("128:0", "96x160:2"), input_size=224)
    assert [train_size(model, epoch) for epoch in range(4)] == 2 * [(128, 128)] + 2 * [(96, 160)]
    assert train_size(ModelOptions(input_size=224), 7) == (224, 224)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("128",), "'128' is not SIZE:EPOCH"),
        (("0:0",), "is not SIZE:EPOCH"),
        (("8x0:0",), "is not SIZE:EPOCH"),
        (("128:-1",), "is not SIZE:EPOCH"),
        (("128:5",), "begin with SIZE:0"),
        (("128:0", "160:0"), "must begin later"),
        (("128:0", "160:9", "192:3"), "must begin later"),
    ],
)
def test_other_texts_and_orders_are_refused(texts, message):
    with pytest.raises(OptionError, match=f"--train-sizes: .*{message}"):
        stages(texts)
