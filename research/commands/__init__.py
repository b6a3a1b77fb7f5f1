"""The commands. Each is a module with `main(argv)`, whose first line of documentation `understudy` lists."""

GROUPS = {
    "Train": ("train", "sweep", "study"),
    "Data": ("preview", "split", "generate", "filter", "label", "annotate", "select"),
    "Models": ("evaluate", "score", "export", "serve"),
    "Runs and machines": ("report", "diagnose", "plan", "benchmark", "cache"),
}

# These compile training steps: their process begins with huge pages and with switches of the compiler for CPUs.
STEPS = ("train", "study", "benchmark", "diagnose")
RUNS = ("train", "study", "sweep")  # signals mean to them what they mean to a run
