"""architectures/tracing.py: what each layer of a model gives for one image."""

from torch import nn

from architectures.tracing import traced


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(5, 3)  # called after what is made after it
        self.stem = nn.Conv2d(3, 5, 4, stride=4)
        self.pair = Pair()

    def forward(self, x):
        x, _ = self.pair(self.stem(x))
        return self.head(x.mean((2, 3)))


def test_shapes_come_in_the_order_of_calls_and_no_hook_stays():
    net = Net()
    summary, shapes = traced(net, (8, 12))
    assert list(shapes.items()) == [("stem", (1, 5, 2, 3)), ("pair", ()), ("head", (1, 3))]
    assert summary.parameters == 2 * 2 + 2 + 5 * 3 + 3 + 3 * 16 * 5 + 5
    assert summary.macs == 2 * 3 * 5 * 3 * 16 + 5 * 3
    assert not any(module._forward_hooks for module in net.modules())
