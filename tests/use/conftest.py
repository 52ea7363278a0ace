from trained_runs import trained

__all__ = ["trained"]
