"""Studies on real data: the files of ``randbasis compare`` (``*.toml``), and what defaults are chosen by.

``sweep`` makes the runs that default learning rates are chosen from, ``rounding`` those that ``fuse_rounding`` is
judged by; both write a page.
"""
