"""Messages name an option as the user would write it."""

from __future__ import annotations

import pytest

from qwen_vl_classifier import TrainConfig
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.config.spelling import did_you_mean, flags_in_use, naming_flags, spelled
from qwen_vl_classifier.data.loading import load_examples
from qwen_vl_classifier.errors import ConfigError, DataError


def test_keywords_in_python_and_flags_on_the_command_line():
    assert [spelled("id_column"), spelled("allow_outside", True)] == ["id_column=", "allow_outside=True"]
    with naming_flags():
        assert [spelled("id_column"), spelled("allow_outside", True)] == ["--id-column", "--allow-outside"]
        assert spelled("positive", "it's") == """--positive 'it'"'"'s'"""
    assert not flags_in_use()


def test_one_error_in_two_interfaces(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "a.png").touch()
    data = tmp_path / "data" / "rows.csv"
    data.write_text("image,text,label\n../a.png,words,1\n")
    with pytest.raises(DataError, match="add allow_outside=True to permit it"):
        load_examples(data)
    assert main(["train", str(data), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "add --allow-outside to permit it" in message
    assert "allow_outside" not in message
    data.write_text("image,words\n,x\n")
    assert main(["train", str(data), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "name the column of the text with --text-column, or give one text for all rows with --text" in message


def test_the_name_of_an_option_alone():
    with pytest.raises(ConfigError, match=r"^weight_decay -1: give 0 or more$"):
        TrainConfig(weight_decay=-1)
    with naming_flags(), pytest.raises(ConfigError, match=r"^--weight-decay -1: give 0 or more$"):
        TrainConfig(weight_decay=-1)


def test_a_misspelled_word_is_recognised_in_any_case_and_an_unlike_one_is_not():
    assert (
        did_you_mean("Lable", ("label", "text"))
        == did_you_mean("LABEL", ["text", "label"])
        == ("; did you mean 'label'?")
    )
    assert did_you_mean("weather", ("label", "text")) == did_you_mean("label", ()) == ""
