"""METHODS SIDE BY SIDE: a study file to runs, and runs to a report of quality per byte.

``record`` and ``study`` are the plain types; ``study_file`` reads a study, ``budgets`` and ``rivals`` make its rows
configurations, ``runs`` makes one run a record, ``pool`` makes them all, ``report`` says what came out.
"""
