"""MobileSAM's weights and what is wrong with them; its targets are checked in test_sam_reference.py."""

import subprocess

import pytest
import torch

from samfeat.teacher_cache.schema import Provenance
from samfeat.teacher_cache.teachers import make_teacher, mobile_sam, teacher_of, unfetched


def test_weights_are_asked_for(tmp_path):
    assert unfetched("mobile_sam", checkpoint=None, downloads=tmp_path) == ""
    with pytest.raises(ValueError, match=r"give --checkpoint mobile_sam.pt \(weights/mobile_sam.pt of github.com/"):
        make_teacher("mobile_sam")
    with pytest.raises(FileNotFoundError, match=r"no MobileSAM checkpoint at .*absent.pt"):
        make_teacher("mobile_sam", checkpoint=tmp_path / "absent.pt")
    assert teacher_of(Provenance({"name": "mobile_sam"}, {}, {}, 0)) is None


def test_the_official_name_stands_for_the_official_file(tmp_path):
    torch.save({}, tmp_path / "mobile_sam.pt")
    with pytest.raises(ValueError, match="damaged, or not the official file"):
        make_teacher("mobile_sam", checkpoint=tmp_path / "mobile_sam.pt")


def test_the_digest_is_gits(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 5000)  # more than a block
    said = subprocess.run(["git", "hash-object", str(path)], capture_output=True, text=True, check=True).stdout
    assert mobile_sam.git_blob(path) == said.strip()


def test_other_weights_are_refused(tmp_path):
    pytest.importorskip("mobile_sam", reason="pip install 'samfeat[mobile-sam]'")
    torch.save({"image_encoder.pos_embed": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt does not hold MobileSAM's weights"):
        make_teacher("mobile_sam", checkpoint=tmp_path / "other.pt")


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    torch.save({}, tmp_path / "other.pt")
    monkeypatch.setattr(mobile_sam, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'samfeat\[mobile-sam\]'"):
        make_teacher("mobile_sam", checkpoint=tmp_path / "other.pt")
