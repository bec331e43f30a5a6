"""The Hub on loopback answers the unmodified client as the real one does. The other tests stand on these."""

from pathlib import Path

import pytest
from hub_server import GITATTRIBUTES, Hub
from huggingface_hub import CommitOperationAdd, HfApi, HfFileSystem, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

BIG = bytes(range(256)) * 400


def folder(tmp_path: Path, **files: bytes) -> Path:
    path = tmp_path / "folder"
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        (path / name.replace("_", ".")).write_bytes(content)
    return path


def test_a_folder_goes_up_in_one_commit_and_comes_down(hub: Hub, tmp_path: Path) -> None:
    api = HfApi(token=hub.user("me"))
    url = api.create_repo("me/model", private=True)
    assert url.repo_id == "me/model"
    assert api.repo_exists("me/model")
    assert not api.file_exists("me/model", "config.json")
    path = folder(tmp_path, config_json=b"{}", model_safetensors=BIG)
    commit = api.upload_folder(repo_id="me/model", folder_path=path, commit_message="All of it")

    repo = hub.repos["me/model"]
    assert [c.title for c in repo.history()] == ["All of it", "initial commit"]
    assert repo.files() == {".gitattributes": GITATTRIBUTES, "config.json": b"{}", "model.safetensors": BIG}
    assert repo.find("main").files["model.safetensors"].lfs
    assert commit.oid == repo.history()[0].oid
    assert api.file_exists("me/model", "config.json")

    info = api.model_info("me/model", files_metadata=True)
    assert info.private
    assert info.sha == commit.oid
    assert {s.rfilename: s.size for s in info.siblings}["model.safetensors"] == len(BIG)
    assert api.list_repo_files("me/model") == [".gitattributes", "config.json", "model.safetensors"]
    down = snapshot_download("me/model", token=api.token, cache_dir=tmp_path / "cache")
    assert (Path(down) / "model.safetensors").read_bytes() == BIG
    # Nothing but the API saw the token.
    assert all(request.authorized != request.path.startswith(("/upload", "/objects")) for request in hub.requests)


def test_an_unchanged_file_is_not_committed_again(hub: Hub, tmp_path: Path) -> None:
    api = HfApi(token=hub.user("me"))
    api.create_repo("me/model")
    path = folder(tmp_path, config_json=b"{}", model_safetensors=BIG)
    first = api.upload_folder(repo_id="me/model", folder_path=path)
    again = api.upload_folder(repo_id="me/model", folder_path=path)
    assert again.oid == first.oid
    assert len(hub.repos["me/model"].history()) == 2


def test_large_files_go_up_in_parts(hub: Hub) -> None:
    api = HfApi(token=hub.user("me"))
    api.create_repo("me/model")
    hub.part_size = 30_000
    api.upload_file(path_or_fileobj=BIG, path_in_repo="model.safetensors", repo_id="me/model")
    assert hub.repos["me/model"].files()["model.safetensors"] == BIG
    assert len(hub.sent("PUT", "/part/")) == 4


def test_a_commit_with_a_bad_operation_changes_nothing(hub: Hub) -> None:
    api = HfApi(token=hub.user("me"))
    hub.repo("me/model")
    readme = CommitOperationAdd("README.md", b"---\nlicense: no-such-license\n---\n")
    with pytest.raises(ValueError, match="license"):
        api.create_commit("me/model", [CommitOperationAdd("a.txt", b"a"), readme], commit_message="x")
    added, parent = CommitOperationAdd("a.txt", b"a"), "0" * 40
    with pytest.raises(HfHubHTTPError, match="commit has happened since"):
        api.create_commit("me/model", [added], commit_message="x", parent_commit=parent)
    assert list(hub.repos["me/model"].files()) == [".gitattributes"]


def test_the_storage_refuses_content_of_another_checksum(hub: Hub) -> None:
    import urllib.error
    import urllib.request

    request = urllib.request.Request(hub._signed(f"/upload/{'0' * 64}"), data=b"something else", method="PUT")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
    assert not hub.objects


def test_branches_tags_and_pull_requests(hub: Hub, tmp_path: Path) -> None:
    api = HfApi(token=hub.user("me"))
    repo = hub.repo("me/model", **{"config.json": b"1"})
    api.create_branch("me/model", branch="next")
    api.create_branch("me/model", branch="next", exist_ok=True)
    api.upload_file(path_or_fileobj=b"2", path_in_repo="config.json", repo_id="me/model", revision="next")
    assert (repo.files()["config.json"], repo.files("next")["config.json"]) == (b"1", b"2")
    api.create_tag("me/model", tag="v1")

    other = HfApi(token=hub.user("other"))
    pull = other.upload_file(path_or_fileobj=b"3", path_in_repo="config.json", repo_id="me/model", create_pr=True)
    assert (pull.pr_num, pull.pr_revision) == (1, "refs/pr/1")
    assert repo.files("refs/pr/1")["config.json"] == b"3"
    assert repo.files()["config.json"] == b"1"
    assert other.get_discussion_details("me/model", 1).is_pull_request

    refs = api.list_repo_refs("me/model", include_pull_requests=True)
    assert {ref.name for ref in refs.branches} == {"main", "next"}
    assert [ref.ref for ref in refs.tags + refs.pull_requests] == ["refs/tags/v1", "refs/pr/1"]
    for revision, content in (("next", b"2"), ("v1", b"1"), ("refs/pr/1", b"3"), (repo.refs["refs/heads/next"], b"2")):
        path = hf_hub_download("me/model", "config.json", revision=revision, cache_dir=tmp_path)
        assert Path(path).read_bytes() == content


def test_who_may_do_what(hub: Hub, tmp_path: Path) -> None:
    mine, reader, other = HfApi(token=hub.user("me")), HfApi(token=hub.user("me", "read")), HfApi(token=hub.user("you"))
    nobody, wrong = HfApi(token=False), HfApi(token="hf_wrong")
    hub.repo("me/open", **{"config.json": b"{}"})
    hub.repo("me/secret", private=True, **{"config.json": b"{}"})
    hub.repo("me/gated", gated=True, **{"config.json": b"{}"})

    assert nobody.model_info("me/open").id == "me/open"
    assert mine.whoami()["name"] == "me"
    with pytest.raises(RepositoryNotFoundError):
        nobody.model_info("me/secret")
    with pytest.raises(RepositoryNotFoundError):
        other.model_info("me/secret")
    with pytest.raises(RepositoryNotFoundError):
        mine.model_info("me/missing")
    with pytest.raises(HfHubHTTPError, match="401"):
        wrong.model_info("me/open")
    assert reader.model_info("me/secret").private

    assert other.model_info("me/gated").gated == "auto"
    for api in (nobody, other):
        with pytest.raises(GatedRepoError):
            hf_hub_download("me/gated", "config.json", token=api.token, cache_dir=tmp_path)
    hub.repos["me/gated"].granted.add("you")
    assert hf_hub_download("me/gated", "config.json", token=other.token, cache_dir=tmp_path)

    for api, status in ((nobody, "401"), (reader, "403"), (other, "403"), (wrong, "401")):
        with pytest.raises(HfHubHTTPError, match=status):
            api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="me/open")
        with pytest.raises(HfHubHTTPError, match=status):
            api.create_repo("me/new")
    with pytest.raises(HfHubHTTPError, match="409"):
        mine.create_repo("me/open")
    assert list(hub.repos) == ["me/open", "me/secret", "me/gated"]


def test_what_is_not_there(hub: Hub, tmp_path: Path) -> None:
    hub.repo("me/model")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("me/model", "config.json", revision="nope", cache_dir=tmp_path)
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("me/model", "config.json", cache_dir=tmp_path)


def test_faults_that_pass_are_survived_by_the_client(hub: Hub, tmp_path: Path) -> None:
    api = HfApi(token=hub.user("me"))
    hub.repo("me/model")
    # The client writes what it downloads in pieces of 10 MiB, and resumes behind the last whole one.
    content = bytes(11 * 2**20)
    faults = [
        hub.fail("POST", "/preupload/", status=429, retry_after=0),
        hub.fail("POST", "/objects/batch", status=503),
        hub.fail("PUT", "/upload/", cut_after=10_000),
        hub.fail("GET", "/objects/", cut_after=len(content) - 1000),
    ]
    api.upload_file(path_or_fileobj=content, path_in_repo="model.safetensors", repo_id="me/model")
    assert Path(hf_hub_download("me/model", "model.safetensors", cache_dir=tmp_path)).read_bytes() == content
    assert [fault.seen for fault in faults] == [1, 1, 1, 1]
    # The second request asked for the rest alone.
    assert [request.status for request in hub.sent("GET", "/objects/")] == [200, 206]


@pytest.mark.parametrize("kind", ["dataset", "space"])
def test_data_sets_and_spaces_are_repositories_of_their_own(hub: Hub, tmp_path: Path, kind: str) -> None:
    api = HfApi(token=hub.user("me"))
    hub.repo("me/pets", **{"config.json": b"{}"})
    url = api.create_repo("me/pets", repo_type=kind, private=True, space_sdk="gradio" if kind == "space" else None)
    assert (url.repo_id, url.repo_type) == ("me/pets", kind)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("me/pets", repo_type=kind, space_sdk="gradio" if kind == "space" else None)
    (tmp_path / "up" / "data").mkdir(parents=True)
    (tmp_path / "up" / "app.py").write_bytes(b"app")
    (tmp_path / "up" / "data" / "train.parquet").write_bytes(BIG)
    commit = api.upload_folder(repo_id="me/pets", repo_type=kind, folder_path=tmp_path / "up")

    repo = hub.repos[f"{kind}s/me/pets"]
    assert repo.find("main").files["data/train.parquet"].lfs
    assert list(hub.repos["me/pets"].files()) == [".gitattributes", "config.json"]
    info = api.repo_info("me/pets", repo_type=kind)
    assert (info.id, info.sha, info.private) == ("me/pets", commit.oid, True)
    if kind == "space":
        assert info.sdk == "gradio"
    assert api.list_repo_files("me/pets", repo_type=kind) == [".gitattributes", "app.py", "data/train.parquet"]
    top = api.list_repo_tree("me/pets", repo_type=kind)
    assert [file.path for file in top] == [".gitattributes", "app.py", "data"]
    found = api.get_paths_info("me/pets", ["data", "data/train.parquet", "none"], repo_type=kind)
    assert [file.path for file in found] == ["data", "data/train.parquet"]
    assert found[1].size == len(BIG)
    path = hf_hub_download("me/pets", "data/train.parquet", repo_type=kind, token=api.token, cache_dir=tmp_path)
    assert Path(path).read_bytes() == BIG
    files = HfFileSystem(token=api.token, skip_instance_cache=True)
    assert files.read_bytes(f"{kind}s/me/pets/data/train.parquet", start=10, end=20) == BIG[10:20]
    pull = HfApi(token=hub.user("me")).upload_file(
        path_or_fileobj=b"2", path_in_repo="app.py", repo_id="me/pets", repo_type=kind, create_pr=True
    )
    assert api.get_discussion_details("me/pets", pull.pr_num, repo_type=kind).is_pull_request


def test_a_space_needs_an_sdk(hub: Hub) -> None:
    api = HfApi(token=hub.user("me"))
    with pytest.raises(ValueError, match="sdk"):
        api.create_repo("me/demo", repo_type="space")
    assert not hub.repos
