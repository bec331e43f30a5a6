"""A Hugging Face Hub on loopback, for the unmodified client: what goes over the wire is what is tested.

Two origins, as on the real Hub: the API with git-like repositories, and a storage for large files behind signed links
that must not be sent a token. State lives in memory and is inspected by the tests in the same process.

A fault is put in with `hub.fail(...)`: a status (with `Retry-After`), or a connection that is cut after some bytes.
"""

import asyncio
import base64
import binascii
import hashlib
import json
import re
import secrets
import socket
import threading
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

import yaml
from aiohttp import web

# Bytes after which the answer to the request in hand is cut.
_CUT_AFTER: ContextVar[int | None] = ContextVar("cut_after", default=None)

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".png", ".jpg", ".npz", ".parquet")
LFS_SIZE = 10 * 2**20
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
REPO_NAME = re.compile(r"^(?!.*(--|\.\.))[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")
PULL_REF = re.compile(r"^refs/pr/(\d+)$")
COMMIT = re.compile(r"^[0-9a-f]{40}$")
# What a data set's and a Space's id starts with in `Hub.repos`, as in their addresses. A model's has no prefix.
PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}
SDKS = ("gradio", "docker", "static")
LICENSES = {"mit", "apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "openrail", "other", "unknown"}


@dataclass(frozen=True)
class User:
    name: str
    role: str = "write"


@dataclass(frozen=True)
class Blob:
    content: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        ).encode()

    @property
    def oid(self) -> str:
        stored = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    description: str
    author: str
    files: dict[str, Blob]
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"))


@dataclass
class Repo:
    id: str
    private: bool = False
    gated: bool = False
    sdk: str | None = None
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    granted: set[str] = field(default_factory=set)

    @property
    def owner(self) -> str:
        return self.name.split("/")[0]

    @property
    def name(self) -> str:
        """The id without the type's prefix, as the API gives it."""
        return self.id.removeprefix(PREFIXES[self.type])

    @property
    def type(self) -> str:
        return next((kind for kind, prefix in PREFIXES.items() if prefix and self.id.startswith(prefix)), "model")

    def add(
        self, ref: str, parent: Commit | None, title: str, author: str, files: dict[str, Blob], text: str
    ) -> Commit:
        tree = "".join(f"{path} {blob.oid}\n" for path, blob in sorted(files.items()))
        salt = f"{parent.oid if parent else ''}{title}{author}{len(self.commits)}"
        commit = Commit(
            hashlib.sha1((tree + salt).encode()).hexdigest(), parent.oid if parent else None, title, text, author, files
        )
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit

    def find(self, revision: str) -> Commit | None:
        if COMMIT.match(revision):
            return self.commits.get(revision)
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        return None

    def history(self, revision: str = "main") -> list[Commit]:
        """Commits of a revision, the newest first."""
        commit, found = self.find(revision), []
        while commit is not None:
            found.append(commit)
            commit = self.commits[commit.parent] if commit.parent else None
        return found

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Contents of the files at a revision, by path."""
        commit = self.find(revision)
        assert commit is not None, f"{self.id} has no revision {revision}"
        return {path: blob.content for path, blob in commit.files.items()}


@dataclass
class Fault:
    """What goes wrong with requests whose method and path match."""

    method: str
    path: re.Pattern[str]
    times: int
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    seen: int = 0


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    authorized: bool
    status: int
    bytes: int  # of the answer's body


class ApiError(Exception):
    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers


class Hub:
    """The server and its state. `reset()` between tests."""

    def __init__(self, api_socket: socket.socket) -> None:
        self._api_socket = api_socket
        self._storage_socket = reserve()
        self.endpoint = f"http://127.0.0.1:{api_socket.getsockname()[1]}"
        self.storage = f"http://127.0.0.1:{self._storage_socket.getsockname()[1]}"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="hub", daemon=True)
        self._started = threading.Event()
        self.reset()

    # -- for tests --------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.users: dict[str, User] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.errors: list[BaseException] = []
        self.part_size: int | None = None
        self._signature = secrets.token_hex(8)

    def user(self, name: str, role: str = "write") -> str:
        """Makes a user, and returns a token of that role."""
        token = f"hf_{name}_{role}_{secrets.token_hex(4)}"
        self.users[token] = User(name, role)
        return token

    def repo(self, repo_id: str, private: bool = False, gated: bool = False, **files: bytes) -> Repo:
        """Makes a repository as the website would; `files` are added in a second commit.

        A data set's id is `datasets/me/name`, a Space's `spaces/me/name`.
        """
        repo = self.repos[repo_id] = Repo(repo_id, private, gated)
        first = repo.add("refs/heads/main", None, "initial commit", repo.owner, self._initial(), "")
        if files:
            self.commit(repo_id, files)
        assert first is not None
        return repo

    def commit(self, repo_id: str, files: dict[str, bytes | None], revision: str = "main") -> Commit:
        """Commits files behind the client's back; `None` deletes."""
        repo = self.repos[repo_id]
        parent = repo.find(revision)
        assert parent is not None
        changed = dict(parent.files)
        for path, content in files.items():
            if content is None:
                del changed[path]
            else:
                changed[path] = Blob(content, is_lfs(path, len(content)))
        return repo.add(f"refs/heads/{revision}", parent, "change", repo.owner, changed, "")

    def fail(
        self,
        method: str,
        path: str,
        *,
        times: int = 1,
        status: int | None = None,
        retry_after: int | None = None,
        cut_after: int | None = None,
    ) -> Fault:
        """Lets the next `times` requests fail that match `method` and the regular expression `path`."""
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        fault = Fault(method, re.compile(path), times, status, headers, cut_after)
        self.faults.append(fault)
        return fault

    def sent(self, method: str, path: str) -> list[Request]:
        """Requests that matched so far."""
        return [r for r in self.requests if r.method == method and re.search(path, r.path)]

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(10), "The Hub did not start."

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    # -- the servers ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._cleanup())
        self._loop.close()

    async def _serve(self) -> None:
        self._runners = []
        for routes, sock in ((self._api_routes(), self._api_socket), (self._storage_routes(), self._storage_socket)):
            app = web.Application(middlewares=[self._middleware], client_max_size=2**32)
            app.add_routes(routes)
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            await web.SockSite(runner, sock).start()
            self._runners.append(runner)

    async def _cleanup(self) -> None:
        for runner in self._runners:
            await runner.cleanup()

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Any) -> web.StreamResponse:
        status = size = 0
        path = request.rel_url.raw_path
        try:
            fault = self._fault(request.method, path)
            if fault is not None and fault.status is not None:
                await request.read()
                raise ApiError(fault.status, "The server is busy.", **fault.headers)
            if fault is not None and fault.cut_after is not None:
                if request.method in ("PUT", "POST"):
                    await request.content.read(fault.cut_after)
                    request.transport.abort()  # type: ignore[union-attr]
                    return web.Response()
                _CUT_AFTER.set(fault.cut_after)
            response = await handler(request)
            status = response.status
            size = 0 if request.method == "HEAD" else response.content_length or 0
            return response
        except ApiError as error:
            status = error.status
            headers = {"X-Error-Message": error.message, **error.headers}
            if error.code:
                headers["X-Error-Code"] = error.code
            return web.json_response({"error": error.message}, status=error.status, headers=headers)
        except (web.HTTPException, ConnectionError, asyncio.CancelledError):
            raise
        except BaseException as error:
            self.errors.append(error)
            raise
        finally:
            self.requests.append(Request(request.method, path, "Authorization" in request.headers, status, size))

    def _fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.method == method and fault.path.search(path) and fault.seen < fault.times:
                fault.seen += 1
                return fault
        return None

    # -- who may do what ----------------------------------------------------------------------------------------------

    def _initial(self) -> dict[str, Blob]:
        return {".gitattributes": Blob(GITATTRIBUTES)}

    def _caller(self, request: web.Request) -> User | None:
        header = request.headers.get("Authorization")
        if header is None:
            return None
        user = self.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise ApiError(401, "Invalid credentials in Authorization header")
        return user

    def _find(self, request: web.Request) -> Repo:
        """The repository of a request. One that the caller may not see does not exist."""
        user = self._caller(request)
        info = request.match_info
        kind = info.get("kind", "models")
        prefix = "" if kind == "models" else f"{kind}/"
        repo = self.repos.get(f"{prefix}{info['owner']}/{info['name']}")
        if repo is None or (repo.private and (user is None or user.name != repo.owner)):
            if user is None:
                raise ApiError(401, "Invalid username or password.", "RepoNotFound")
            raise ApiError(404, "Repository not found", "RepoNotFound")
        return repo

    def _writable(self, request: web.Request, pull_request: bool = False) -> tuple[Repo, User]:
        repo, user = self._find(request), self._caller(request)
        if user is None:
            raise ApiError(401, "Invalid username or password.", "RepoNotFound")
        if user.role != "write":
            raise ApiError(403, "Forbidden: you must use a write token to upload to a repository.")
        if user.name != repo.owner and not pull_request:
            raise ApiError(403, f'Authorization error: you don\'t have write access to "{repo.id}".')
        return repo, user

    def _revision(self, repo: Repo, revision: str) -> Commit:
        commit = repo.find(revision)
        if commit is None:
            raise ApiError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # -- the API --------------------------------------------------------------------------------------------------

    def _api_routes(self) -> list[web.RouteDef]:
        api = "/api/{kind:models|datasets|spaces}/{owner}/{name}"
        repos = ("/{kind:datasets|spaces}/{owner}/{name}", "/{owner}/{name}")
        return [
            web.get("/api/whoami-v2", self._whoami),
            web.post("/api/repos/create", self._create_repo),
            web.post("/api/validate-yaml", self._validate_yaml),
            web.get(api, self._repo_info),
            web.get(api + "/revision/{revision}", self._repo_info),
            web.get(api + "/auth-check/write", self._auth_check_write),
            web.get(api + "/refs", self._list_refs),
            web.get(api + "/commits/{revision}", self._list_commits),
            web.get(api + "/tree/{revision}", self._list_tree),
            web.get(api + "/tree/{revision}/{path:.*}", self._list_tree),
            web.post(api + "/branch/{revision}", self._create_branch),
            web.post(api + "/tag/{revision}", self._create_tag),
            web.post(api + "/preupload/{revision}", self._preupload),
            web.post(api + "/commit/{revision}", self._commit),
            web.post(api + "/paths-info/{revision}", self._paths_info),
            web.get(api + "/discussions/{number}", self._discussion),
            *(web.post(repo + ".git/info/lfs/objects/batch", self._lfs_batch) for repo in repos),
            *(web.post(repo + ".git/info/lfs/verify", self._lfs_verify) for repo in repos),
            web.post("/lfs-complete/{oid}", self._lfs_complete),
            *(web.get(repo + "/resolve/{revision}/{path:.*}", self._resolve) for repo in repos),
        ]

    async def _whoami(self, request: web.Request) -> web.Response:
        user = self._caller(request)
        if user is None:
            raise ApiError(401, "Invalid username or password.")
        token = {"displayName": "test", "role": user.role}
        return web.json_response({"type": "user", "name": user.name, "orgs": [], "auth": {"accessToken": token}})

    async def _create_repo(self, request: web.Request) -> web.Response:
        user = self._caller(request)
        if user is None:
            raise ApiError(401, "Invalid username or password.")
        data = await request.json()
        owner = data.get("organization") or user.name
        kind = data.get("type", "model")
        repo_id = f"{PREFIXES[kind]}{owner}/{data['name']}"
        url = f"{self.endpoint}/{repo_id}"
        if not REPO_NAME.match(data["name"]):
            raise ApiError(400, f"Invalid repository name: {data['name']}")
        if user.role != "write" or owner != user.name:
            raise ApiError(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
        if repo_id in self.repos:
            response = {"error": f"You already created this {kind} repo", "url": url}
            return web.json_response(response, status=409)
        if kind == "space" and data.get("sdk") not in SDKS:
            raise ApiError(400, f'"sdk" must be one of {SDKS}')
        private = data.get("visibility") == "private" or data.get("private") is True
        self.repo(repo_id, private=private).sdk = data.get("sdk")
        return web.json_response({"url": url, "name": f"{owner}/{data['name']}", "id": secrets.token_hex(12)})

    async def _validate_yaml(self, request: web.Request) -> web.Response:
        errors, warnings = check_card((await request.json())["content"])
        body = {
            "errors": [{"message": message} for message in errors],
            "warnings": [{"message": message} for message in warnings],
        }
        return web.json_response(body, status=400 if errors else 200)

    async def _repo_info(self, request: web.Request) -> web.Response:
        repo = self._find(request)
        commit = self._revision(repo, request.match_info.get("revision", "main"))
        blobs = "blobs" in request.query
        card = commit.files.get("README.md")
        data = read_card(card.content.decode(errors="replace")) if card else None
        return web.json_response(
            {
                "_id": repo.id,
                "id": repo.name,
                **({"modelId": repo.name, "spaces": []} if repo.type == "model" else {}),
                **({"sdk": repo.sdk} if repo.type == "space" else {}),
                "author": repo.owner,
                "sha": commit.oid,
                "lastModified": commit.date,
                "createdAt": commit.date,
                "private": repo.private,
                "gated": "auto" if repo.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": (data or {}).get("tags", []),
                "pipeline_tag": (data or {}).get("pipeline_tag"),
                "library_name": (data or {}).get("library_name"),
                "cardData": data,
                "siblings": [sibling(path, blob, blobs) for path, blob in sorted(commit.files.items())],
            },
            dumps=lambda value: json.dumps(value, default=str),
        )

    async def _auth_check_write(self, request: web.Request) -> web.Response:
        self._writable(request)
        return web.json_response({})

    async def _list_refs(self, request: web.Request) -> web.Response:
        repo = self._find(request)

        def listed(prefix: str) -> list[dict[str, str]]:
            return [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
                for ref, oid in repo.refs.items()
                if ref.startswith(prefix)
            ]

        body = {"branches": listed("refs/heads/"), "tags": listed("refs/tags/"), "converts": []}
        if "include_prs" in request.query:
            body["pullRequests"] = listed("refs/pr/")
        return web.json_response(body)

    async def _list_commits(self, request: web.Request) -> web.Response:
        repo = self._find(request)
        self._revision(repo, request.match_info["revision"])
        return web.json_response(
            [
                {
                    "id": commit.oid,
                    "title": commit.title,
                    "message": commit.description,
                    "authors": [{"user": commit.author}],
                    "date": commit.date,
                }
                for commit in repo.history(request.match_info["revision"])
            ]
        )

    async def _list_tree(self, request: web.Request) -> web.Response:
        repo = self._find(request)
        commit = self._revision(repo, request.match_info["revision"])
        folder = request.match_info.get("path", "").strip("/")
        inside = f"{folder}/" if folder else ""
        paths = sorted(path for path in {*commit.files, *folders(commit.files)} if path.startswith(inside))
        if folder and not paths:
            raise ApiError(404, f"{folder} does not exist on {commit.oid}", "EntryNotFound")
        if request.query.get("recursive", "false").lower() != "true":
            paths = [path for path in paths if "/" not in path.removeprefix(inside)]
        return web.json_response([entry(commit, path) for path in paths])

    async def _paths_info(self, request: web.Request) -> web.Response:
        repo = self._find(request)
        commit = self._revision(repo, request.match_info["revision"])
        known = {*commit.files, *folders(commit.files)}
        paths = (await request.post()).getall("paths", [])
        return web.json_response([entry(commit, str(path)) for path in paths if path in known])

    async def _create_branch(self, request: web.Request) -> web.Response:
        repo, _ = self._writable(request)
        data = await request.json() if request.can_read_body else {}
        return self._create_ref(repo, f"refs/heads/{request.match_info['revision']}", data.get("startingPoint", "main"))

    async def _create_tag(self, request: web.Request) -> web.Response:
        repo, _ = self._writable(request)
        tag = (await request.json())["tag"]
        return self._create_ref(repo, f"refs/tags/{tag}", request.match_info["revision"])

    def _create_ref(self, repo: Repo, ref: str, start: str) -> web.Response:
        if ref in repo.refs:
            raise ApiError(409, "Reference already exists")
        repo.refs[ref] = self._revision(repo, start).oid
        return web.json_response({})

    async def _preupload(self, request: web.Request) -> web.Response:
        repo, _ = self._writable(request, pull_request="create_pr" in request.query)
        commit = self._revision(repo, request.match_info["revision"])
        files = []
        for file in (await request.json())["files"]:
            base64.b64decode(file["sample"], validate=True)
            lfs = is_lfs(file["path"], file["size"])
            answer = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if file["path"] in commit.files:
                answer["oid"] = commit.files[file["path"]].etag
            files.append(answer)
        return web.json_response({"files": files, "commitOid": commit.oid})

    async def _commit(self, request: web.Request) -> web.Response:
        """Reads and checks all operations, then applies them: a commit is whole or absent."""
        create_pr = "create_pr" in request.query
        repo, user = self._writable(request, pull_request=create_pr)
        revision = request.match_info["revision"]
        parent = self._revision(repo, revision)
        if request.content_type != "application/x-ndjson":
            raise ApiError(415, f"Expected application/x-ndjson, got {request.content_type}")
        lines = [json.loads(line) for line in (await request.read()).splitlines() if line.strip()]
        if not lines or lines[0]["key"] != "header":
            raise ApiError(400, "The first line of a commit must be its header")
        header = lines[0]["value"]
        if not header.get("summary"):
            raise ApiError(400, "A commit needs a summary")
        expected = header.get("parentCommit")
        if expected is not None and not parent.oid.startswith(expected):
            raise ApiError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for line in lines[1:]:
            self._apply(files, line["key"], line["value"])
        if "README.md" in files and (errors := check_card(files["README.md"].content.decode(errors="replace"))[0]):
            raise ApiError(400, "; ".join(errors))

        if create_pr:
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
            ref = f"refs/pr/{number}"
        else:
            ref = revision if PULL_REF.match(revision) else f"refs/heads/{revision}"
            if ref not in repo.refs:
                raise ApiError(400, f"Cannot commit to {revision}: it is not a branch")
        commit = repo.add(ref, parent, header["summary"], user.name, files, header.get("description", ""))
        body = {
            "success": True,
            "commitOid": commit.oid,
            "commitUrl": f"{self.endpoint}/{repo.id}/commit/{commit.oid}",
            "hookOutput": "",
        }
        if create_pr:
            body["pullRequestUrl"] = f"{self.endpoint}/{repo.id}/discussions/{number}"
        return web.json_response(body)

    def _apply(self, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if path.startswith("/") or ".." in path.split("/"):
            raise ApiError(400, f"Invalid path: {path}")
        if key == "file":
            try:
                content = base64.b64decode(value["content"], validate=True)
            except binascii.Error as error:
                raise ApiError(400, f"{path} is not base64") from error
            if is_lfs(path, len(content)):
                raise ApiError(400, f"{path} must be uploaded as a large file")
            files[path] = Blob(content)
        elif key == "lfsFile":
            content = self.objects.get(value["oid"], b"")
            if value["oid"] not in self.objects or value.get("size") not in (None, len(content)):
                raise ApiError(400, f"Your push was rejected because the LFS object of {path} does not exist")
            files[path] = Blob(content, lfs=True)
        elif key == "deletedFile":
            if path not in files:
                raise ApiError(404, "A file with this name doesn't exist", "EntryNotFound")
            del files[path]
        elif key == "deletedFolder":
            for name in [name for name in files if name.startswith(f"{path.rstrip('/')}/")]:
                del files[name]
        else:
            raise ApiError(400, f"Unknown operation: {key}")

    async def _discussion(self, request: web.Request) -> web.Response:
        repo = self._find(request)
        commit = self._revision(repo, f"refs/pr/{request.match_info['number']}")
        return web.json_response(
            {
                "title": commit.title,
                "num": int(request.match_info["number"]),
                "author": {"name": commit.author},
                "createdAt": commit.date,
                "status": "open",
                "repo": {"name": repo.name, "type": repo.type},
                "isPullRequest": True,
                "changes": {"base": "refs/heads/main"},
                "filesWithConflicts": [],
                "events": [],
            }
        )

    async def _resolve(self, request: web.Request) -> web.StreamResponse:
        repo, user = self._find(request), self._caller(request)
        revision, path = request.match_info["revision"], request.match_info["path"]
        member = user is not None and (user.name == repo.owner or user.name in repo.granted)
        if repo.gated and not member and path != "README.md":
            message = f"Access to {repo.type} {repo.name} is restricted. "
            message += "You must have access to it and be authenticated to access it. Please log in."
            if user is not None:
                message = f"Access to {repo.type} {repo.name} is restricted and you are not in the authorized list."
            raise ApiError(401 if user is None else 403, message, "GatedRepo")
        commit = self._revision(repo, revision)
        blob = commit.files.get(path)
        if blob is None:
            raise ApiError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.oid})
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes", "ETag": f'"{blob.etag}"'}
        if not blob.lfs:
            return await send(request, blob.content, headers)
        self.objects.setdefault(blob.sha256, blob.content)
        headers |= {
            "X-Linked-Size": str(len(blob.content)),
            "X-Linked-Etag": f'"{blob.sha256}"',
            "ETag": f'"{blob.oid}"',
            "Location": self._signed(f"/objects/{blob.sha256}"),
        }
        return web.Response(status=302, headers=headers)

    # -- large files ----------------------------------------------------------------------------------------------

    async def _lfs_batch(self, request: web.Request) -> web.Response:
        # Whoever may see a repository may open a pull request, so uploads need no right to its branches.
        repo, _ = self._writable(request, pull_request=True)
        if request.content_type != "application/vnd.git-lfs+json":
            raise ApiError(415, f"Expected application/vnd.git-lfs+json, got {request.content_type}")
        data = await request.json()
        if data["operation"] != "upload" or data.get("hash_algo") != "sha256":
            raise ApiError(422, "Only uploads by sha256")
        objects = []
        for item in data["objects"]:
            oid, size = item["oid"], item["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.objects:
                upload: dict[str, Any] = {"href": self._signed(f"/upload/{oid}"), "header": {}}
                if self.part_size is not None and size > self.part_size and "multipart" in data["transfers"]:
                    parts = range(1, 1 + -(-size // self.part_size))
                    upload = {
                        "href": f"{self.endpoint}/lfs-complete/{oid}",
                        "header": {
                            "chunk_size": str(self.part_size),
                            **{str(part): self._signed(f"/part/{oid}/{part}") for part in parts},
                        },
                    }
                verify = {"href": f"{self.endpoint}/{repo.id}.git/info/lfs/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        return web.json_response({"transfer": "basic", "objects": objects}, content_type="application/vnd.git-lfs+json")

    async def _lfs_verify(self, request: web.Request) -> web.Response:
        self._writable(request, pull_request=True)
        data = await request.json()
        content = self.objects.get(data["oid"])
        if content is None or len(content) != data["size"]:
            raise ApiError(404, "The object was not uploaded whole")
        return web.json_response({})

    async def _lfs_complete(self, request: web.Request) -> web.Response:
        data = await request.json()
        parts = [self.parts.get((data["oid"], part["partNumber"])) for part in data["parts"]]
        for part, sent in zip(parts, data["parts"], strict=True):
            if part is None or f'"{hashlib.md5(part).hexdigest()}"' != sent["etag"]:
                raise ApiError(400, f"Part {sent['partNumber']} was not uploaded")
        self._store(data["oid"], b"".join(part for part in parts if part is not None))
        return web.json_response({})

    def _storage_routes(self) -> list[web.RouteDef]:
        return [
            web.get("/objects/{oid}", self._download),
            web.put("/upload/{oid}", self._upload),
            web.put("/part/{oid}/{part}", self._upload_part),
        ]

    def _signed(self, path: str) -> str:
        return f"{self.storage}{path}?signature={self._signature}"

    def _check_signed(self, request: web.Request) -> None:
        # As storage providers do: a signed link and a token at once are refused, and the token must not get here.
        if "Authorization" in request.headers:
            raise ApiError(400, "Only one auth mechanism allowed")
        if request.query.get("signature") != self._signature:
            raise ApiError(403, "The signature does not match")

    def _store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise ApiError(400, "The content does not have this SHA-256")
        self.objects[oid] = content

    async def _upload(self, request: web.Request) -> web.Response:
        self._check_signed(request)
        self._store(request.match_info["oid"], await request.read())
        return web.Response()

    async def _upload_part(self, request: web.Request) -> web.Response:
        self._check_signed(request)
        content = await request.read()
        self.parts[request.match_info["oid"], int(request.match_info["part"])] = content
        return web.Response(headers={"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    async def _download(self, request: web.Request) -> web.StreamResponse:
        self._check_signed(request)
        content = self.objects.get(request.match_info["oid"])
        if content is None:
            raise ApiError(404, "No such object")
        return await send(request, content, {"Accept-Ranges": "bytes", "ETag": f'"{request.match_info["oid"]}"'})


def reserve() -> socket.socket:
    """Binds a free port on loopback. Until something listens, connections to it are refused."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_SIZE)


def folders(files: dict[str, Blob]) -> set[str]:
    return {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}


def entry(commit: Commit, path: str) -> dict[str, Any]:
    """A file or folder as the tree lists it."""
    blob = commit.files.get(path)
    last = {"id": commit.oid, "title": commit.title, "date": commit.date}
    if blob is None:
        oid = hashlib.sha1(path.encode()).hexdigest()
        return {"type": "directory", "oid": oid, "size": 0, "path": path, "lastCommit": last}
    found: dict[str, Any] = {"type": "file", "oid": blob.oid, "size": len(blob.content), "path": path}
    if blob.lfs:
        found["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
    return {**found, "lastCommit": last}


def sibling(path: str, blob: Blob, blobs: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"rfilename": path}
    if blobs:
        found |= {"size": len(blob.content), "blobId": blob.oid}
        if blob.lfs:
            found["lfs"] = {"sha256": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
    return found


def read_card(text: str) -> dict[str, Any] | None:
    match = re.match(r"\A\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", text, re.DOTALL)
    data = yaml.safe_load(match[1]) if match else None
    return data if isinstance(data, dict) else None


def check_card(text: str) -> tuple[list[str], list[str]]:
    """Checks a card's metadata as the Hub does: what is an error there, and what only a warning."""
    try:
        data = read_card(text)
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = []
    for key in ("library_name", "pipeline_tag", "license"):
        if key in data and not isinstance(data[key], str):
            errors.append(f'"{key}" must be a string')
    if isinstance(data.get("license"), str) and data["license"] not in LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    for key in ("tags", "datasets", "base_model"):
        values = data.get(key, [])
        values = [values] if isinstance(values, str) else values
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            errors.append(f'"{key}" must be a list of strings')
        elif key == "base_model" and any(value.count("/") > 1 or " " in value for value in values):
            errors.append('"base_model" must be the id of a model on the Hub')
    for index in data.get("model-index", []):
        for result in index.get("results", []):
            if not index.get("name") or not result.get("task", {}).get("type"):
                errors.append('"model-index[0].name" and "task.type" are required')
            if not {"name", "type"} <= set(result.get("dataset", {})):
                errors.append('"model-index[0].results[0].dataset" needs a name and a type')
            if not all({"type", "value"} <= set(metric) for metric in result.get("metrics", [])):
                errors.append('"model-index[0].results[0].metrics[0]" needs a type and a value')
    return errors, []


async def send(request: web.Request, content: bytes, headers: dict[str, str]) -> web.StreamResponse:
    """Sends content or the part that `Range` asks for; cuts the connection where a fault says so."""
    status, body = 200, content
    wanted = request.headers.get("Range")
    if wanted is not None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
        if match is None or int(match[1]) >= len(content):
            raise ApiError(416, "Range not satisfiable", **{"Content-Range": f"bytes */{len(content)}"})
        first = int(match[1])
        last = min(int(match[2] or len(content) - 1), len(content) - 1)
        status, body = 206, content[first : last + 1]
        headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
    headers = {"Content-Type": "application/octet-stream", **headers, "Content-Length": str(len(body))}
    cut_after = _CUT_AFTER.get()
    if cut_after is None or request.method == "HEAD":
        return web.Response(status=status, headers=headers, body=body)
    response = web.StreamResponse(status=status, headers=headers)
    await response.prepare(request)
    await response.write(body[:cut_after])
    await asyncio.sleep(0.05)
    request.transport.abort()  # type: ignore[union-attr]
    return response
