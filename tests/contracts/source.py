"""What every source promises: a stable list of episodes, and of each exactly the frames that it has."""

from itertools import pairwise
from pathlib import PurePosixPath

import numpy as np
import pytest

from avrl.episodes import View
from avrl.errors import ConfigError, IntegrityError, NotFoundError


class SourceContract:
    """Subclass as ``class TestMine(SourceContract)`` with `module`, `make` and `damage`."""

    module = None  # the source module under test
    parts = ()  # the parts that `make` makes

    def make(self, folder):
        """Lay out three episodes or more, as published, in a folder that ``--from`` could name; return it."""
        raise NotImplementedError

    def damage(self, raw):
        """Flip a bit of the first episode, in place."""
        raise NotImplementedError

    @pytest.fixture
    def copy(self, tmp_path):
        return self.make(tmp_path / "copy")

    @pytest.fixture
    def raw(self, copy, tmp_path):
        """The raw artifact: links to the copy, as `fetch` makes them."""
        root = tmp_path / "raw"
        for name, path in self.module.local_files(copy, self.parts).items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).symlink_to(path.absolute())
        return root

    def opened(self, raw, tmp_path, episode, size=32):
        one, frames = self.module.frames(raw, episode, View(size), tmp_path)
        return one, list(frames)

    # The list.

    def test_lists_every_episode_in_an_order_that_stays(self, raw):
        episodes, dropped = self.module.survey(raw)
        assert not dropped
        assert len(episodes) >= 3
        assert [one.episode_index for one in episodes] == list(range(len(episodes)))
        assert len({one.episode_id for one in episodes}) == len(episodes)
        assert (episodes, dropped) == self.module.survey(raw)

    def test_says_where_each_episode_lies_and_in_which_split(self, raw):
        for one in self.module.survey(raw)[0]:
            assert (raw / one.file).exists()
            assert not PurePosixPath(one.file).is_absolute()
            assert one.split in ("train", "val", "test")

    def test_an_empty_folder_has_no_episodes(self, tmp_path):
        (tmp_path / "raw").mkdir()
        assert self.module.survey(tmp_path / "raw") == ([], [])

    # The frames.

    @pytest.mark.parametrize("size", [16, 48])
    def test_gives_every_frame_as_a_square_of_bytes_that_jpeg_takes(self, raw, tmp_path, size):
        for episode in self.module.survey(raw)[0]:
            one, frames = self.opened(raw, tmp_path, episode, size)
            assert len(frames) == one.length > 0
            (kind,) = {(frame.shape, frame.dtype.name) for frame in frames}
            assert kind in (((size, size, 3), "uint8"), ((3, size, size), "uint8"))

    def test_opening_tells_what_only_the_files_know(self, raw, tmp_path):
        for episode in self.module.survey(raw)[0]:
            one, _ = self.opened(raw, tmp_path, episode)
            assert one.fps > 0
            assert one.task
            assert isinstance(one.language, str)
            for name in ("episode_index", "episode_id", "split", "file", "member", "offset"):
                assert getattr(one, name) == getattr(episode, name)

    def test_frames_are_pictures_that_change_and_the_same_twice(self, raw, tmp_path):
        episode = self.module.survey(raw)[0][0]
        frames = self.opened(raw, tmp_path, episode)[1]
        assert np.array_equal(frames, self.opened(raw, tmp_path, episode)[1])
        assert np.std(frames[0]) > 5
        assert any(not np.array_equal(a, b) for a, b in pairwise(frames))

    def test_a_flipped_bit_is_refused_by_name(self, raw, tmp_path):
        self.damage(raw)
        episodes, _ = self.module.survey(raw)
        with pytest.raises(IntegrityError, match=str(raw / episodes[0].file)):
            self.opened(raw, tmp_path, episodes[0])
        one, frames = self.opened(raw, tmp_path, episodes[1])
        assert len(frames) == one.length  # the others are as good as before

    # The files.

    def test_local_copies_are_found_and_missing_parts_are_not(self, copy, tmp_path):
        found = self.module.local_files(copy, self.parts)
        assert found
        assert all(path.exists() for path in found.values())
        (tmp_path / "empty").mkdir()
        with pytest.raises(NotFoundError, match="empty"):
            self.module.local_files(tmp_path / "empty", self.parts)

    def test_published_files_have_plain_names_and_known_sizes(self):
        published = [part for part in self.module.PARTS if part != "sample"]
        assert set(self.module.DEFAULT_PARTS) <= set(published)
        if not self.module.BASE_URL:  # nobody publishes it: there are only local copies
            with pytest.raises(ConfigError, match="--from DIR"):
                self.module.remote_files(tuple(published))
            return
        files = self.module.remote_files(tuple(published))
        assert len({one.name for one in files}) == len(files) >= len(published)
        for one in files:
            assert not PurePosixPath(one.name).is_absolute()
            assert ".." not in PurePosixPath(one.name).parts
            assert one.bytes is None or one.bytes > 10**6
        assert set(self.module.BYTES) <= set(published)

    def test_says_where_it_comes_from_and_on_what_terms(self):
        if self.module.BASE_URL:
            assert self.module.BASE_URL.startswith("https://")
            assert self.module.BASE_URL.endswith("/")
            assert "CC" in self.module.LICENCE
        assert self.module.LICENCE
        assert "\n" not in self.module.LICENCE
