# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Models on Azure, Bedrock and Vertex AI: the real SDKs of these clouds, with invalid credentials, over loopback."""

import json
import sys

import pytest
from anthropic.lib.aws import _auth
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from omniopd_trl.accounting.pricing import price_of
from omniopd_trl.errors import ConfigError, MissingExtraError, TeacherError
from omniopd_trl.teachers.base import Prefix
from omniopd_trl.teachers.load import remote_teacher
from omniopd_trl.teachers.providers.capabilities import capabilities_of
from omniopd_trl.teachers.remote.settings import EngineSettings
from tests.support.loopback import Fault, Loopback, wire
from tests.support.loopback.teachers import ask, services  # noqa: F401 (a fixture)

QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3 + 4?"}]
PREFIX = Prefix(QUESTION, "First we add 3 and")
SECRET = "wJalrXUtnFEMI4K7MDENGbPxRfiCY"
VARIABLES = (
    *("AZURE_OPENAI_API_KEY", "AZURE_OPENAI_AD_TOKEN", "AZURE_OPENAI_ENDPOINT", "OPENAI_API_VERSION"),
    *("AWS_BEARER_TOKEN_BEDROCK", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"),
    *("AWS_REGION", "AWS_DEFAULT_REGION", "ANTHROPIC_BEDROCK_BASE_URL", "ANTHROPIC_VERTEX_BASE_URL"),
    *("GOOGLE_VERTEX_BASE_URL", "ANTHROPIC_VERTEX_PROJECT_ID", "CLOUD_ML_REGION", "GOOGLE_CLOUD_PROJECT"),
    *("GOOGLE_CLOUD_LOCATION", "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_API_KEY", "GOOGLE_GENAI_USE_VERTEXAI"),
)


@pytest.fixture(autouse=True)
def environment(services, monkeypatch, tmp_path):  # noqa: F811
    """A function that sets the variables of a cloud. No other one is set, and no file of the user is read."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "CLOUDSDK_CONFIG"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    _auth._get_session.cache_clear()  # which keeps credentials of the same region

    def put(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


AZURE = {"AZURE_OPENAI_API_KEY": SECRET, "OPENAI_API_VERSION": "2025-04-01-preview"}
BEDROCK = {"AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "eu-west-1"}
VERTEX = {"GOOGLE_CLOUD_PROJECT": "project-7", "GOOGLE_CLOUD_LOCATION": "europe-west1"}


@pytest.fixture(scope="module")
def private_key():
    """The key of an invalid service account."""
    key = rsa.generate_private_key(65537, 2048)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return key.private_bytes(*form).decode()


@pytest.fixture
def google(environment, private_key, tmp_path):
    """The environment of Vertex AI: an account whose tokens come from a loopback server, which is returned."""
    token = {"access_token": "ya29.a0AfH6SMBtoken", "expires_in": 3600, "token_type": "Bearer"}
    with Loopback(lambda *_: token) as tokens:
        account = {
            "type": "service_account",
            "client_email": "me@project-7.iam.gserviceaccount.com",
            "private_key": private_key,
            "private_key_id": "1",
            "project_id": "project-7",
            "token_uri": tokens.url + "/token",
        }
        path = tmp_path / "account.json"
        path.write_text(json.dumps(account))
        environment(GOOGLE_APPLICATION_CREDENTIALS=str(path), **VERTEX)
        yield tokens


def exchange(name, answer, num_samples=1, **options):
    """Probe a teacher and ask it once; returns its reply and the last request that the server got."""
    with Loopback(answer) as server:
        teacher = remote_teacher(name, base_url=server.url, settings=EngineSettings(timeout=5), **options)
        teacher.probe(QUESTION)
        (reply,) = ask(teacher, PREFIX, num_samples=num_samples)
    return reply, server.requests[-1]


class TestAzure:
    """`azure:DEPLOYMENT`."""

    @pytest.mark.parametrize("variable", ["AZURE_OPENAI_API_KEY", "AZURE_OPENAI_AD_TOKEN"])
    def test_request(self, environment, monkeypatch, variable):
        """The deployment is in the path, the version in the query, and the key or the token in its own header."""
        environment(**AZURE)
        monkeypatch.delenv("AZURE_OPENAI_API_KEY")
        environment(**{variable: SECRET})
        extra = {"extra_body": {"user": "me"}, "extra_headers": {"X-Title": "t"}}
        reply, sent = exchange("azure:gpt-6-luna", wire.openai, num_samples=2, **extra)
        path = "/openai/deployments/gpt-6-luna/chat/completions?api-version=2025-04-01-preview"
        assert sent.path == path
        assert len(reply.rollouts) == 2
        header = ("api-key", SECRET) if variable.endswith("KEY") else ("authorization", f"Bearer {SECRET}")
        assert sent.headers[header[0]] == header[1]
        assert sent.headers["x-title"] == "t"
        expected = {"n": 2, "temperature": 1.0, "top_p": 1.0, "max_completion_tokens": 70, "reasoning_effort": "none"}
        assert sent.body.items() >= {**expected, "user": "me"}.items()
        assert not {"top_k", "min_p", "max_tokens"} & set(sent.body)

    def test_endpoint_from_the_environment(self, environment):
        """As the SDK reads it."""
        with Loopback(wire.openai) as server:
            environment(**AZURE, AZURE_OPENAI_ENDPOINT=server.url + "/")
            (reply,) = ask(remote_teacher("azure:prod-1"), PREFIX)
        assert len(reply.rollouts) == 1
        assert server.requests[0].path.startswith("/openai/deployments/prod-1/chat/completions?")

    @pytest.mark.parametrize(
        ("missing", "words"),
        [
            ("AZURE_OPENAI_API_KEY", "export AZURE_OPENAI_API_KEY"),
            ("OPENAI_API_VERSION", "export OPENAI_API_VERSION"),
            ("AZURE_OPENAI_ENDPOINT", "teacher_base_url.*export AZURE_OPENAI_ENDPOINT"),
        ],
    )
    def test_missing_variables(self, environment, missing, words, monkeypatch):
        """One line that names the variable, before a request."""
        environment(**AZURE, AZURE_OPENAI_ENDPOINT="http://127.0.0.1:9")
        monkeypatch.delenv(missing)
        with pytest.raises((TeacherError, ConfigError), match=words) as caught:
            remote_teacher("azure:gpt-6-luna").probe(QUESTION)
        assert "\n" not in str(caught.value)
        assert SECRET not in str(caught.value)


class TestBedrock:
    """`bedrock:MODEL`."""

    MODEL = "eu.anthropic.claude-haiku-4-5-20251001-v1:0"

    def test_request(self, environment):
        """The model is in the path, the request is signed, and Claude's prefill is as at Anthropic."""
        environment(**BEDROCK)
        reply, sent = exchange(f"bedrock:{self.MODEL}", wire.anthropic, extra_body={"top_k": 9})
        assert sent.path.replace("%3A", ":") == f"/model/{self.MODEL}/invoke"
        assert sent.headers["authorization"].startswith("AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/")
        assert "eu-west-1/bedrock" in sent.headers["authorization"]
        assert SECRET not in str(sent)
        assert sent.body["messages"][-1] == {"role": "assistant", "content": "First we add 3 and"}
        assert (sent.body["temperature"], sent.body["max_tokens"], sent.body["top_k"]) == (1.0, 70, 9)
        assert "model" not in sent.body
        assert len(reply.rollouts) == 1

    def test_key(self, environment):
        """A key of Bedrock needs no other credentials."""
        environment(AWS_BEARER_TOKEN_BEDROCK=SECRET, AWS_REGION="us-east-1")
        _, sent = exchange("bedrock:anthropic.claude-sonnet-5", wire.anthropic)
        assert sent.headers["authorization"] == f"Bearer {SECRET}"
        assert sent.body["messages"][-1]["role"] == "user"

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE", "AWS_SECRET_ACCESS_KEY": SECRET}, "AWS_REGION"),
            ({"AWS_REGION": "eu-west-1"}, "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
            ({"AWS_REGION": "eu-west-1", "AWS_PROFILE": "nobody"}, "nobody"),
            (
                {"AWS_BEARER_TOKEN_BEDROCK": "\u201cquoted\u201d", "AWS_REGION": "eu-west-1"},
                "AWS_BEARER_TOKEN_BEDROCK",
            ),
        ],
    )
    def test_missing_variables(self, environment, values, words):
        """One line that names them, before a request; nothing is charged."""
        environment(**values)
        with Loopback(wire.anthropic) as server:
            with pytest.raises((TeacherError, ConfigError), match=words) as caught:
                remote_teacher(f"bedrock:{self.MODEL}", base_url=server.url).probe(QUESTION)
        assert server.requests == []
        assert "\n" not in str(caught.value)
        assert SECRET not in str(caught.value)

    def test_missing_package(self, environment, monkeypatch):
        """The message holds the pip command."""
        environment(**BEDROCK)
        monkeypatch.setitem(sys.modules, "boto3", None)
        with pytest.raises(MissingExtraError, match=r"pip install -e '\.\[bedrock\]'"):
            remote_teacher(f"bedrock:{self.MODEL}").probe(QUESTION)

    def test_other_models(self):
        """This client speaks Claude's language only."""
        with pytest.raises(ConfigError, match="reaches Claude only"):
            remote_teacher("bedrock:amazon.nova-lite-v1:0")
        assert remote_teacher("bedrock:arn:aws:bedrock:eu-west-1:1:application-inference-profile/x").model[:3] == "arn"


class TestVertex:
    """`vertex:MODEL`."""

    @pytest.mark.parametrize("own", [{}, {"ANTHROPIC_VERTEX_PROJECT_ID": "other-8", "CLOUD_ML_REGION": "us-east5"}])
    def test_claude(self, google, environment, own):
        """Names of Claude go to Anthropic's SDK: its own variables, else Google's, and one token for all requests."""
        environment(**own)
        reply, sent = exchange("vertex:claude-haiku-4-5@20251001", wire.anthropic)
        project, region = ("other-8", "us-east5") if own else ("project-7", "europe-west1")
        place = f"/projects/{project}/locations/{region}/publishers/anthropic/models/"
        assert sent.path.replace("%40", "@") == place + "claude-haiku-4-5@20251001:rawPredict"
        assert sent.headers["authorization"] == "Bearer ya29.a0AfH6SMBtoken"
        assert sent.body["messages"][-1] == {"role": "assistant", "content": "First we add 3 and"}
        assert len(reply.rollouts) == 1
        assert {request.path for request in google.requests} == {"/token"}

    @pytest.mark.parametrize("elsewhere", ["true", "false"])
    def test_gemini(self, google, environment, elsewhere):
        """Other names go to Google's SDK, whatever its own switch of the product says."""
        environment(GOOGLE_GENAI_USE_VERTEXAI=elsewhere, GOOGLE_API_KEY="AIzaSyB8vN3kQ2rTxWm")
        extra = {"extra_headers": {"X-Title": "t"}}
        reply, sent = exchange("vertex:gemini-2.5-flash-lite", wire.gemini, num_samples=3, **extra)
        place = "/projects/project-7/locations/europe-west1/publishers/google/models/"
        assert place + "gemini-2.5-flash-lite:generateContent" in sent.path
        assert sent.headers["authorization"] == "Bearer ya29.a0AfH6SMBtoken"
        assert "x-goog-api-key" not in sent.headers
        assert sent.headers["x-title"] == "t"
        assert sent.body["generationConfig"]["candidateCount"] == 3
        assert sent.body["contents"][-1]["role"] == "model"
        assert len(reply.rollouts) == 3

    @pytest.mark.parametrize("model", ["claude-haiku-4-5", "gemini-2.5-flash-lite"])
    def test_missing_variables(self, model):
        """One line that names the variable; the SDKs would ask the network for a project."""
        with pytest.raises(TeacherError, match=r"needs a project.* GOOGLE_CLOUD_PROJECT\. Run `export") as caught:
            remote_teacher(f"vertex:{model}").probe(QUESTION)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("model", "answer"), [("claude-haiku-4-5", wire.anthropic), ("gemini-2.5-flash-lite", wire.gemini)]
    )
    @pytest.mark.parametrize("fault", ["no file", "refused"])
    def test_no_credentials(self, google, environment, model, answer, fault, tmp_path):
        """Credentials that cannot be read or renewed end the probe in one line, and no request is charged."""
        if fault == "no file":
            environment(GOOGLE_APPLICATION_CREDENTIALS=str(tmp_path / "none.json"))
        else:
            google.fault = lambda *_: Fault(400, {"error": "invalid_grant", "error_description": "account not found"})
        with Loopback(answer) as server:
            teacher = remote_teacher(f"vertex:{model}", base_url=server.url, settings=EngineSettings(max_attempts=1))
            with pytest.raises(TeacherError, match="gcloud auth application-default login") as caught:
                teacher.probe(QUESTION)
        assert server.requests == []
        assert "\n" not in str(caught.value)
        assert ("none.json" if fault == "no file" else "invalid_grant") in str(caught.value)
        assert teacher.budget.forfeited_tokens == 0

    def test_missing_package(self, environment, monkeypatch):
        """The message holds the pip command."""
        environment(**VERTEX)
        monkeypatch.setitem(sys.modules, "google.auth", None)
        with pytest.raises(MissingExtraError, match=r"pip install -e '\.\[vertex\]'"):
            remote_teacher("vertex:claude-haiku-4-5").probe(QUESTION)


@pytest.mark.case("T21")
@pytest.mark.parametrize("name", ["azure:gpt-6-luna", "bedrock:anthropic.claude-haiku-4-5", "vertex:claude-haiku-4-5"])
def test_redirects_are_refused(name, google, environment):
    """By the clients of the clouds as well."""
    environment(**AZURE, **BEDROCK)
    with Loopback(wire.openai) as other, Loopback(wire.openai) as server:
        server.fault = lambda *_: Fault(307, "", {"location": other.url})
        with pytest.raises(TeacherError, match="redirects to"):
            ask(remote_teacher(name, base_url=server.url), PREFIX)
    assert other.requests == []


@pytest.mark.case("F7")
@pytest.mark.parametrize(
    ("provider", "model", "continuation", "samples", "temperature", "reasoning"),
    [
        ("azure", "gpt-6-luna", "instruct", 8, True, {"reasoning_effort": "none"}),
        ("azure", "prod-1", "instruct", 8, True, {}),
        ("bedrock", "us.anthropic.claude-haiku-4-5-20251001-v1:0", "prefill", 1, True, {}),
        ("bedrock", "anthropic.claude-sonnet-4-20250514-v1:0", "prefill", 1, True, {}),
        ("bedrock", "anthropic.claude-haiku-5-5", "instruct", 1, False, {"thinking": {"type": "disabled"}}),
        ("vertex", "claude-3-5-sonnet-v2@20241022", "prefill", 1, True, {}),
        ("vertex", "gemini-2.5-flash", "prefill", 8, True, {"thinking_config": {"thinking_budget": 0}}),
        ("openai", "openai/gpt-6-luna", "instruct", 8, True, {"reasoning_effort": "none"}),
        ("openai", "openai/o3", "instruct", 8, False, {"reasoning_effort": "low"}),
        ("openai", "deepseek/deepseek-chat", "instruct", 1, True, {"thinking": {"type": "disabled"}}),
        ("openai", "deepseek/deepseek-reasoner", "instruct", 1, False, {}),
        ("openai", "anthropic/claude-sonnet-5", "instruct", 1, False, {}),
        ("openai", "openrouter/anthropic/claude-haiku-4-5", "instruct", 1, True, {}),
        ("openai", "google/gemini-3.5-flash-lite", "instruct", 1, True, {}),
        ("openai", "openai/gpt-oss-20b", "instruct", 8, True, {}),
        ("openai", "google/gemma-3-27b-it", "instruct", 8, True, {}),
        ("openai", "mistralai/Mistral-7B-Instruct-v0.3", "instruct", 8, True, {}),
    ],
)
def test_capabilities(provider, model, continuation, samples, temperature, reasoning):
    """A model has the capabilities of its vendor, whatever is before its name, and ids on the Hub keep the default."""
    known = capabilities_of(provider, model)
    assert (known.continuation, known.samples_per_request) == (continuation, samples)
    assert (known.takes_temperature, known.reasoning_off) == (temperature, reasoning)


@pytest.mark.case("F7")
@pytest.mark.parametrize(
    ("provider", "model", "base_url", "rates"),
    [
        ("azure", "gpt-6-luna", None, (0.1, 0.5)),
        ("bedrock", "global.anthropic.claude-haiku-4-5-20251001-v1:0", None, (1.0, 5.0)),
        ("bedrock", "eu.anthropic.claude-haiku-4-5-20251001-v1:0", None, (1.1, 5.5)),
        ("vertex", "claude-haiku-4-5@20251001", None, (1.0, 5.0)),
        ("vertex", "gemini-2.5-flash", None, (0.3, 2.5)),
        ("openai", "openai/gpt-6-luna", "https://openrouter.ai/api/v1", (0.1, 0.5)),
        ("openai", "gpt-6-luna", "https://api.openai.com/v1", (0.1, 0.5)),
        ("openai", "openai/gpt-6-luna", "http://127.0.0.1:4000/v1", None),
        ("vllm", "gpt-6-luna", "https://openrouter.ai/api/v1", None),
    ],
)
def test_prices(provider, model, base_url, rates):
    """From the table, under the service that is paid: a known address has its own prices, an unknown one has none."""
    price = price_of(provider, model, base_url=base_url)
    assert (None if price is None else (price.input, price.output)) == rates
