import subprocess
import sys


def test_import_registers_all_ids_and_imports_nothing_heavy():
    program = (
        "import sys, sd_gym, gymnasium as gym\n"
        "assert all(id in gym.registry for id in sd_gym.registered_ids())\n"
        "assert 'SD/Classification-Mini-v0' in sd_gym.registered_ids()\n"
        "heavy = {'torch', 'transformers', 'datasets', 'stable_baselines3', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_switch_knows_no_task_and_no_rl():
    program = (
        "import sys, sd_gym.switch\n"
        "rooms = {name.split('.')[1] for name in sys.modules if name.startswith('sd_gym.')}\n"
        "assert not rooms & {'tasks', 'envs', 'agents', 'backbones', 'objectives'}, rooms\n"
        "assert 'stable_baselines3' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_reports_and_comparisons_import_no_torch():
    """They read files of runs, so that they take two seconds, not ten."""
    program = (
        "import sys, sd_gym.agents.report.page, sd_gym.agents.report.compare\n"
        "from sd_gym.errors import quiet\n"
        "quiet()\n"
        "heavy = {'torch', 'transformers', 'datasets', 'stable_baselines3'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import transformers\n"
        "assert not transformers.utils.logging.is_progress_bar_enabled()\n"
        "assert transformers.utils.logging.get_verbosity() == transformers.utils.logging.ERROR\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
