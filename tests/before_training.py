"""What the tests of lr_find, overfit and doctor share: a small CNN and the bundled digits."""

SMALL = [
    *("--data-set", "DIGITS", "--model", "simple_cnn", "--input-size", "8", "--device", "cpu"),
    *("--num-workers", "0", "--no-repeated-aug", "--aa", "none", "--color-jitter", "none"),
    *("--mixup", "0", "--cutmix", "0", "--reprob", "0", "--hflip", "0", "--warmup-epochs", "0"),
    *("--lr", "3e-3", "--unscale-lr", "--epochs", "2", "--no-tensorboard"),
]
