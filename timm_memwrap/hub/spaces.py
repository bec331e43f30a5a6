"""Makes a Space of the page: an app of a few lines that imports this package, and what it needs."""

import json
from importlib.metadata import version

from huggingface_hub import CommitInfo, CommitOperationAdd, RepoCard, RepoUrl, SpaceCardData

from timm_memwrap.hub.client import check_repo_id, hub_api
from timm_memwrap.hub.pushing import send_commit
from timm_memwrap.whole_model import split_revision

__all__ = ["push_space"]

# Those that decide what an answer is, and what shows it.
_PINNED = ("timm", "torch", "gradio", "huggingface-hub", "matplotlib")

_APP = """import timm_memwrap
from timm_memwrap.demo import Page, launch

model = timm_memwrap.from_pretrained({model})
launch(Page(model, title={title}, teach={teach}, save=False))
"""


def push_space(
    model_id: str,
    repo_id: str,
    *,
    teach: bool = False,
    title: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str = "Show a model with its memory",
) -> CommitInfo:
    """Makes a Space that shows a model on the Hub, in one commit.

    Args:
        model_id: Repository of the model, `"owner/name"` or `"owner/name@revision"`. The Space loads it from there.
        repo_id: Repository of the Space, `"owner/name"` or the name of your own; made if it does not exist.
        teach: Whether visitors may teach a copy of their own; nobody can save one.
        title: Title of the page; `None` for the model's name.
        token: Token of the Hub with the role `write`; `None` for the one of `hf auth login` or `HF_TOKEN`.
        private: Whether a Space that is made is private; `None` for the default of the account.
        commit_message: First line of the commit.

    Raises:
        ValueError: If a name is not a valid repo id, or the Space holds another app.
        OSError: `huggingface_hub`'s own, if the model is not there, the Hub refuses or cannot be reached.
    """
    name, _ = split_revision(model_id)
    for each in (name, repo_id):
        check_repo_id(each)
    api = hub_api(token)
    model_name = api.model_info(name, revision=split_revision(model_id)[1]).id
    title = title or model_name.split("/")[-1]
    # Python's own literals: what a name holds stays text.
    app = _APP.format(model=json.dumps(model_id), title=json.dumps(title), teach=teach)
    metadata = SpaceCardData(
        title=title, sdk="gradio", sdk_version=version("gradio"), app_file="app.py", models=[model_name]
    )
    card = RepoCard(
        f"---\n{metadata.to_yaml()}\n---\n\nThe page of [{model_name}](https://huggingface.co/{model_name}).\n"
    )
    pinned = [f"{each}=={version(each)}" for each in _PINNED]
    requirements = "\n".join([f"timm-memwrap[demo]=={version('timm-memwrap')}", *pinned])
    files = {"app.py": app, "requirements.txt": f"{requirements}\n", "README.md": str(card)}
    url: RepoUrl = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
    info = api.space_info(url.repo_id)
    if "app.py" in {sibling.rfilename for sibling in info.siblings or []}:
        there = api.hf_hub_download(url.repo_id, "app.py", repo_type="space", revision=info.sha)
        with open(there, encoding="utf-8") as file:
            if "timm_memwrap.demo" not in file.read():
                raise ValueError(f"The Space {url.repo_id!r} holds another app. Pass the name of another Space.")
    operations = [CommitOperationAdd(path, text.encode()) for path, text in files.items()]
    return send_commit(api, info, "space", operations, commit_message=commit_message)
