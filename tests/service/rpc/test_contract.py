"""The contract passes lint, its code is current, and every RPC and preset is implemented."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from a2sf.policy import PRESETS, CachePolicy
from a2sf.requests import FinishReason, Sampling
from scripts.generate_proto import generate
from service.client import AdminClient, Client, SyncAdminClient, SyncClient
from service.pb import inference_pb2 as pb
from service.rpc.admin import AdminServicer
from service.rpc.inference import InferenceServicer, ModelServicer
from service.server import SERVICES

ROOT = Path(__file__).resolve().parents[3]
SERVICERS = {
    "InferenceService": InferenceServicer,
    "ModelService": ModelServicer,
    "AdminService": AdminServicer,
}
CLIENTS: tuple[tuple[type, type], ...] = ((Client, AdminClient), (SyncClient, SyncAdminClient))
"""For everyone and for operators, of both kinds."""


def values(enum: Any) -> set[str]:
    return set(enum.DESCRIPTOR.values_by_name)


def test_the_committed_code_equals_the_generated_code(tmp_path: Path) -> None:
    generate(tmp_path)
    fresh = {p.name: p.read_text() for p in (tmp_path / "service" / "pb").iterdir()}
    committed = {name: (ROOT / "service" / "pb" / name).read_text() for name in fresh}
    assert set(fresh) >= {"inference_pb2.py", "inference_pb2.pyi", "inference_pb2_grpc.py"}
    assert fresh == committed


def test_the_contract_names_the_code_that_is_generated_from_it() -> None:
    options = pb.DESCRIPTOR.GetOptions()
    assert options.go_package == "a2sf/inference/v1;inferencev1"
    assert (options.java_package, options.java_multiple_files) == ("a2sf.inference.v1", True)
    assert options.java_outer_classname == "InferenceProto"


def test_the_reflection_library_has_no_v1_as_the_clients_page_says() -> None:
    # Once it has one, serve it too and change the page.
    assert find_spec("grpc_reflection.v1alpha") is not None
    assert find_spec("grpc_reflection.v1") is None
    assert "no `v1`" in (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")


def test_every_rpc_has_a_handler_and_a_client_method() -> None:
    services = pb.DESCRIPTOR.services_by_name
    assert set(services) == set(SERVICERS)
    for name, service in services.items():
        assert service.full_name in SERVICES
        for method in service.methods:
            assert method.name in vars(SERVICERS[name]), f"{name}.{method.name} has no handler"
            snake = re.sub(r"(?<!^)(?=[A-Z])", "_", method.name).lower()
            for everyone, operators in CLIENTS:
                client = operators if name == "AdminService" else everyone
                assert callable(getattr(client, snake, None)), f"{client} has no {snake}"


def test_policy_fields_have_the_same_names_on_the_wire_and_in_the_core() -> None:
    assert {f.name for f in pb.CachePolicy.DESCRIPTOR.fields} == set(CachePolicy.model_fields)
    # In the order in which the filters apply, which both promise.
    sampling = [f.name for f in pb.Sampling.DESCRIPTOR.fields]
    assert sampling == list(Sampling.model_fields)


def test_every_preset_and_finish_reason_is_on_the_wire() -> None:
    presets = {name.removeprefix("CACHE_PRESET_").lower() for name in values(pb.CachePreset)}
    assert presets - {"unspecified"} == set(PRESETS)
    reasons = {name.removeprefix("FINISH_REASON_") for name in values(pb.FinishReason)}
    assert reasons - {"UNSPECIFIED"} == {reason.name for reason in FinishReason}


def test_numbers_of_a_request_have_presence_unless_zero_is_the_default() -> None:
    # The core's own default is zero for these, so that "not set" and 0 mean the same.
    zero = {"top_k", "min_p"}
    for message in (pb.CachePolicy, pb.Sampling):
        for field in message.DESCRIPTOR.fields:
            if field.type in (FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_DOUBLE):
                assert field.has_presence != (field.name in zero), field.full_name
    assert all(Sampling.model_fields[name].default == 0 for name in zero)
