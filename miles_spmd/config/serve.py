"""The endpoint of `miles-spmd serve` (`[serve]`)."""

from typing import Annotated

from pydantic import Field

from miles_spmd.config.table import NotEmpty, Table

JOB = "job"


class ServeConfig(Table):
    serve_host: Annotated[str, NotEmpty] = "127.0.0.1"
    """Name or address of the first node at which the endpoint listens, which others than processes of that node reach
    where it is not a loopback address. `job`: the address by which the nodes of the job reach the first one."""
    serve_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port at which it listens; 0: a free one."""
