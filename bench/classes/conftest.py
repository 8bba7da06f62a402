"""What of a machine goes into a results file."""


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)
