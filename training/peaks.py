"""Floating-point operations per second that devices can do at best."""

import torch

# Dense bf16 or fp16 matrix products, 10¹² operations per second, from the makers' data sheets.
# A name that holds another comes first.
PEAKS = (
    ("GB200", 2250),
    ("B200", 2250),
    ("B100", 1750),
    ("GH200", 989),
    ("H200", 989),
    ("H100 PCIe", 756),
    ("H100 NVL", 835),
    ("H100", 989),
    ("A100", 312),
    ("A800", 312),
    ("A40", 150),
    ("A30", 165),
    ("A10G", 70),
    ("A10", 125),
    ("L40S", 362),
    ("L40", 181),
    ("L4", 121),
    ("V100", 125),
    ("T4", 65),
    ("RTX 4090", 165),
    ("RTX 3090", 71),
)


def device_peak(device: torch.device, amp: torch.dtype | None) -> float | None:
    """Floating-point operations per second that ``device`` can do in ``amp``, None if not known."""
    if device.type != "cuda" or amp is None:
        return None
    name = torch.cuda.get_device_name(device)
    if amp == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        return None  # it has no units for that
    return next((1e12 * peak for part, peak in PEAKS if part in name), None)
