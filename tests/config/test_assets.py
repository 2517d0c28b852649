"""A run's directory belongs to one config, wherever the package keeps its files."""

from gkdjax import config
from gkdjax.train import workdir


def test_a_quickstart_that_was_begun_before_its_files_moved_goes_on(tmp_path):
    c = config.default()
    c.student.model = str(config.ASSETS / "quickstart" / "student")
    c.data.train = str(config.ASSETS / "quickstart" / "train.jsonl")
    parsed = config.parse(c)
    workdir.claim(tmp_path, parsed)
    begun_with = tmp_path / "config.json"
    before = str(config.ASSETS.parents[1] / "assets")
    begun_with.write_text(begun_with.read_text().replace(str(config.ASSETS), before))
    workdir.claim(tmp_path, parsed)
