"""The paper's experiments at the scale that one GPU allows: resumable arms, results that accumulate, tables and plots.

::

    python -m benchmarks.paper --table 1 --jobs 4        runs arms for nine minutes; call it again to go on
    python -m benchmarks.paper report                    what there is so far, as tables, report.md and plots
"""
