"""What a run writes, console and files: where it fails, training goes on."""
