"""Timings of randbasis against its references and its peers, each gated by a check of the numbers.

``python -m benchmarks --list`` names the cases, ``python -m benchmarks basis_rate`` runs some of them; ``make bench``
runs all, appends rows to ``benchmarks/results/timings.csv`` and draws the table and the plot from that file.
"""
