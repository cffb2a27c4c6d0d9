"""The S3 servers that other tests rely on: what they promise, and that the fault proxy really fails requests."""

from __future__ import annotations

from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from tests.conftest import S3Server
from tests.s3_fault_proxy import FaultProxy


def client(server: S3Server, *, endpoint: str | None = None, attempts: int = 1) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=endpoint or server.endpoint,
        aws_access_key_id=server.env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=server.env["AWS_SECRET_ACCESS_KEY"],
        region_name=server.env["AWS_REGION"],
        config=Config(retries={"total_max_attempts": attempts, "mode": "standard"}, s3={"addressing_style": "path"}),
    )


def test_second_conditional_put_is_refused(any_s3: S3Server) -> None:
    s3 = client(any_s3)
    s3.create_bucket(Bucket="conditional")
    s3.put_object(Bucket="conditional", Key="one", Body=b"first", IfNoneMatch="*")
    with pytest.raises(ClientError) as refused:
        s3.put_object(Bucket="conditional", Key="one", Body=b"second", IfNoneMatch="*")
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412
    assert s3.get_object(Bucket="conditional", Key="one")["Body"].read() == b"first"


def test_fault_proxy_answers_slow_down_and_passes_the_rest_on(s3_server: S3Server) -> None:
    client(s3_server).create_bucket(Bucket="faults")
    client(s3_server).put_object(Bucket="faults", Key="one", Body=b"content")
    outcomes = []
    with FaultProxy(s3_server.endpoint, probability=0.5, seed=1) as proxy:
        s3 = client(s3_server, endpoint=proxy.endpoint)
        for _ in range(40):
            try:
                outcomes.append(s3.get_object(Bucket="faults", Key="one")["Body"].read())
            except ClientError as error:
                outcomes.append(error.response["Error"]["Code"])
    assert set(outcomes) == {b"content", "SlowDown"}
    assert (proxy.faults, proxy.passed) == (outcomes.count("SlowDown"), outcomes.count(b"content"))
    assert 8 < proxy.faults < 32  # 40 draws at 0.5: mean 20, standard deviation 3.2


def test_fault_proxy_with_probability_one_passes_nothing(s3_server: S3Server) -> None:
    with FaultProxy(s3_server.endpoint, probability=1.0) as proxy, pytest.raises(ClientError, match="SlowDown"):
        client(s3_server, endpoint=proxy.endpoint).list_buckets()
    assert (proxy.faults, proxy.passed) == (1, 0)
