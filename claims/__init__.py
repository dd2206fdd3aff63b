"""Claims: for each method, its paper's headline restated small, and run.

A claim is a module ``claims/<wing>/<method>.py`` with

``PAPER``
    the number in the list of papers, or None for a building block of our own;
``CLAIM``
    the headline in one sentence, restated at the scale of two cores;
``BETTER``
    "higher" or "lower": which way the number that ``run`` returns improves;
``run(seed, *, smoke=False)``
    a dict with the finite numbers "method" and "baseline" (others are recorded beside them), at a tenth of the
    size and in seconds when ``smoke`` is true;

and, where they apply,

``PARITY``
    the margin, in units of the number, within which the method has to equal the baseline;
``SEEDS``
    the number of seeds, fixed beforehand, where three are too few;
``WHY``
    one sentence on why the claim does not hold.

``python -m claims NAME --seeds 0 1 2`` runs one, ``python -m claims --smoke`` all of them small,
``python -m claims --list`` names them.
"""
