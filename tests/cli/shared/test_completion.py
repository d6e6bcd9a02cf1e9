"""Completion by a real shell."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from qwen_vl_classifier.cli.main import VERBS, main

BASH = """
source "$1"
complete -p qwen-vl-classifier >/dev/null || exit 1
while read -r line; do
  COMP_WORDS=($line); [[ $line == *' ' ]] && COMP_WORDS+=('')
  COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 )) COMPREPLY=()
  _shtab_qwen_vl_classifier
  echo "${COMPREPLY[*]}"
done
"""


@pytest.fixture
def script(capsys):
    """Return the script that is printed for a shell."""

    def read(shell: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(["--print-completion", shell])
        assert end.value.code == 0
        return capsys.readouterr().out

    return read


def test_bash_completes_commands_options_choices_and_paths(script, tmp_path):
    (tmp_path / "completion").write_text(script("bash"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "rows.csv").touch()
    expected = {
        "tr": "train",
        "train --obj": "--objective",
        "train --no-exp": "--no-exportable",
        "train --max-image-b": "--max-image-bytes",  # which only the help of all options shows
        "finetune rows.csv --method q": "qlora",
        "train r": "rows.csv",
        "train p": "photos",
        "train rows.csv --out p": "photos",
        "train rows.csv --out r": "",  # a folder, and no file
        "score photos r": "rows.csv",
    }
    done = subprocess.run(
        ["bash", "--norc", "-c", BASH, "bash", "completion"],
        input="".join(f"qwen-vl-classifier {words}\n" for words in expected),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert dict(zip(expected, done.stdout.splitlines(), strict=True)) == expected
    assert not done.stderr


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_accept_the_script(shell, script, tmp_path):
    content = script(shell)
    assert all(verb in content for verb in VERBS)
    if shutil.which(shell):
        (tmp_path / "completion").write_text(content)
        subprocess.run([shell, "-f", "-n", "completion"], cwd=tmp_path, check=True)


def test_an_unknown_shell(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", "bsh"])
    assert end.value.code == 2
    assert "--print-completion 'bsh': expected one of bash, zsh, tcsh; did you mean 'bash'?" in capsys.readouterr().err
