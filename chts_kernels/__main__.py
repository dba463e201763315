"""``python -m chts_kernels``: what runs on this machine."""

from .target import capability_report

if __name__ == "__main__":
    print(capability_report())
