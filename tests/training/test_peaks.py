"""What devices can do at best."""

import torch

from training.peaks import device_peak


def test_peaks_are_known_by_name(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for name, peak in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362e12),
        ("Some other card", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert device_peak(cuda, torch.bfloat16) == peak
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert device_peak(cuda, torch.bfloat16) is None
    assert device_peak(cuda, torch.float16) == 65e12
    assert device_peak(cuda, None) is None
    assert device_peak(torch.device("cpu"), torch.bfloat16) is None
