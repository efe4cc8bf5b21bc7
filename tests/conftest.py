"""The order of the test files: the longest first, so that run.sh's two workers, which take whole
files in turn, end at about the same time.
"""

LONGEST = "benches ranks resume checkpoint kernels faults plan doctor walkthrough report packaging dense_index task_runs sft train many_rollouts".split()


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    # stable: inside a file, and among the others, as they were found
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
