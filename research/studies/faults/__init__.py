"""A study of the diagnosis: faults are planted into small runs, and the diagnosis is asked what is wrong."""
