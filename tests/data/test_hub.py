"""A hub that does not answer."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from data.pretrained import ask_hub_once, load_vocabulary


@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_that_does_not_answer_is_asked_once(
    offline: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its own client would ask six times for each of several files, with pauses."""
    import huggingface_hub

    asked = []

    class Dead:
        def head(self, *args: object, **kwargs: object) -> None:
            asked.append(args)
            raise ConnectionError("no route to host")

        request = stream = get = head

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "get_session", Dead)
    ask_hub_once.cache_clear()
    try:
        for _ in range(2):
            with pytest.raises(ValueError, match="tokenizer nobody/nothing cannot be loaded"):
                load_vocabulary("nobody/nothing")
        assert constants.HF_HUB_OFFLINE and len(asked) == (not offline)
    finally:
        ask_hub_once.cache_clear()
