"""Saving over what is there: one complete version at every moment, and nobody's files are overwritten."""

from __future__ import annotations

import errno
import os
import resource
import signal

import pytest

from qwen_vl_classifier import Classifier
from qwen_vl_classifier.classifier import artifact
from qwen_vl_classifier.classifier.artifact import (
    check_replaceable,
    read_manifest,
    replacing,
)
from qwen_vl_classifier.errors import ArtifactError
from qwen_vl_classifier.files import whole
from tests import crash_points
from tests.classifier.saved_folder import MANIFEST

SAVE = """
import errno, os, sys
from pathlib import Path
from qwen_vl_classifier import Backbone, Classifier
from qwen_vl_classifier.files import whole
from tests import crash_points

folder, moment, barrier, in_one_step = sys.argv[1:]
if in_one_step == "0":
    def refused(one, other):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    whole.exchange = refused
classifier = Classifier.zero_shot(Backbone.load("builtin:tiny", device="cpu", dtype="float32"))
classifier.threshold = 0.9
crash_points.halt(moment, "saved", Path(barrier))
classifier.save(folder)
"""


class TestReplacing:
    """Saving over what is there."""

    def test_a_new_folder_with_its_parents(self, tiny_classifier, tmp_path):
        assert tiny_classifier.save(tmp_path / "a" / "b") == tmp_path / "a" / "b"
        assert read_manifest(tmp_path / "a" / "b").tap == tiny_classifier.tap

    def test_an_empty_folder(self, tiny_classifier, tmp_path):
        (tmp_path / "empty").mkdir()
        read_manifest(tiny_classifier.save(tmp_path / "empty"))

    def test_an_older_classifier_and_all_that_belongs_to_it(self, tiny_classifier, folder):
        for name in ("evaluation.json", "report.html"):
            (folder / name).write_text("of the older one")
        (folder / "backbone").mkdir()
        tiny_classifier.save(folder)
        assert read_manifest(folder).backbone["name"] == "builtin:tiny"
        assert {path.name for path in folder.iterdir()} == {"classifier.json", "head.safetensors", "README.md"}
        assert list(folder.parent.iterdir()) == [folder]

    @pytest.mark.parametrize("kind", ["folder", "file", "files beside a classifier"])
    def test_something_else_is_not_overwritten(self, tiny_classifier, folder, kind):
        place = folder if kind == "files beside a classifier" else folder.parent / "mine"
        if kind == "file":
            place.write_text("mine")
        else:
            place.mkdir(exist_ok=True)
            (place / "thesis.txt").write_text("mine")
        with pytest.raises(ArtifactError, match=r"give a new") as caught:
            tiny_classifier.save(place)
        assert "\n" not in str(caught.value)
        assert (place if kind == "file" else place / "thesis.txt").read_text() == "mine"
        assert read_manifest(folder) == MANIFEST

    def test_what_a_link_points_to_is_replaced(self, tiny_classifier, folder):
        link = folder.parent / "link"
        link.symlink_to(folder)
        tiny_classifier.save(link)
        assert link.is_symlink()
        assert read_manifest(folder).backbone["name"] == "builtin:tiny"
        assert sorted(folder.parent.iterdir()) == [link, folder]

    @pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError, OSError(errno.ENOSPC, "No space left on device")])
    def test_an_interrupted_save_leaves_the_old_one(self, tiny_classifier, folder, monkeypatch, stop):
        def interrupted(*_args, **_options):
            raise stop

        monkeypatch.setattr(artifact, "save_file", interrupted)
        with pytest.raises(ArtifactError if isinstance(stop, OSError) else stop):
            tiny_classifier.save(folder)
        assert read_manifest(folder) == MANIFEST
        assert list(folder.parent.iterdir()) == [folder]

    def test_a_failure_in_the_last_step_leaves_the_old_one(self, tiny_classifier, folder, monkeypatch):
        def failing(_one, _other):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(whole, "exchange", failing)
        with pytest.raises(ArtifactError, match="cannot be written"):
            tiny_classifier.save(folder)
        assert read_manifest(folder) == MANIFEST
        assert list(folder.parent.iterdir()) == [folder]

    def test_a_disk_that_fills_up_while_weights_are_written_leaves_the_old_one(self, tiny_classifier, folder):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # the head has more bytes
        try:
            with pytest.raises(ArtifactError, match="cannot be written"):
                tiny_classifier.save(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert read_manifest(folder) == MANIFEST
        assert list(folder.parent.iterdir()) == [folder]

    @pytest.mark.parametrize(
        ("moment", "in_one_step"),
        [*((moment, True) for moment in crash_points.MOMENTS[1:]), ("before the rename", False)],
    )
    def test_a_kill_at_any_moment_leaves_one_complete_version(
        self, tiny_classifier, tmp_path, fresh, moment, in_one_step
    ):
        folder, barrier = tiny_classifier.save(tmp_path / "saved"), tmp_path / "barrier"
        fresh.start(SAVE, folder, moment, barrier, int(in_one_step))
        crash_points.kill_at(barrier)
        assert fresh.wait().returncode == -signal.SIGKILL
        is_new = moment == "after the rename"
        assert Classifier.load(folder, backbone=tiny_classifier.backbone).threshold == (0.9 if is_new else 0.5)
        tiny_classifier.save(folder)
        assert Classifier.load(folder, backbone=tiny_classifier.backbone).threshold == 0.5
        assert sorted(path.name for path in tmp_path.iterdir()) == ["barrier", "saved"]  # nothing is left of the kill

    def test_a_kill_between_two_renames_is_no_free_place_either(self, folder, tmp_path):
        folder.rename(tmp_path / f".saved.{'0' * 32}.old")  # as a system that cannot exchange names may leave it
        (folder.parent / f".saved.{'1' * 32}.partial").mkdir()
        check_replaceable(folder)
        assert read_manifest(folder) == MANIFEST

    def test_a_roundabout_path_is_no_free_place_either(self, folder):
        roundabout = folder.parent / "not there yet" / ".." / folder.name
        with pytest.raises(ArtifactError, match="holds a saved classifier"):
            check_replaceable(roundabout, overwrite=False)
        (folder / "notes.txt").write_text("mine")
        with pytest.raises(ArtifactError, match=r"holds 'notes\.txt' beside"):
            check_replaceable(roundabout)

    def test_a_link_to_itself_is_no_place(self, tmp_path):
        (tmp_path / "loop").symlink_to("loop")
        with pytest.raises(ArtifactError, match="leads back to itself"):
            check_replaceable(tmp_path / "loop")

    def test_a_place_that_cannot_be_written_is_named(self, tiny_classifier, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ArtifactError, match=r"cannot be written .* give a folder") as caught:
            tiny_classifier.save(tmp_path / "file" / "below")
        assert "\n" not in str(caught.value)

    def test_the_folder_is_whole_or_not_there(self, tmp_path):
        with replacing(tmp_path / "new") as partial:
            (partial / "classifier.json").write_text("{}")
            assert not (tmp_path / "new").exists()
            assert partial.parent == tmp_path
        assert (tmp_path / "new" / "classifier.json").exists()
