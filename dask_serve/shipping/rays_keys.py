"""The keys of Ray Serve's configuration files: what they are called here, or what to do instead."""

from __future__ import annotations

from .spellings import LOGGING

__all__ = [
    "APPLICATION",
    "APPLICATION_ELSEWHERE",
    "ARCHIVES",
    "DEFAULT_POLICY",
    "HTTP",
    "HTTP_ELSEWHERE",
    "OLDER",
    "PACKAGES",
    "SAME",
    "SCALING",
    "SHARED",
    "TOP",
    "UNNAMED",
]

#: Keys of the top, with what to do instead.
TOP = {
    "grpc_options": "there is no gRPC here; the methods are called over HTTP, or from Python by handles",
    "tracing_config": "set the option tracing of http and of deployments; the environment variables OTEL_* of the "
    "processes say where spans go, and OTEL_TRACES_SAMPLER how many",
    "controller_options": "the controller runs in the Dask scheduler: set variables in the environment of that",
    "target_capacity": "set num_replicas, min_replicas and max_replicas to what they are to be, or use "
    "`dask serve scale`",
}
#: Directories of these are sent; Ray's files name remote archives.
ARCHIVES = {
    "working_dir": "modules of the directory where `dask serve deploy` runs travel with the application; a remote "
    "archive is to be unpacked there, and may be named as working_dir of a runtime_env",
    "py_modules": "modules of the directory where `dask serve deploy` runs travel with the application; remote "
    "archives are to be unpacked there, and may be named as py_modules of a runtime_env",
}
PACKAGES = "install it where the workers run, in the same versions everywhere"
#: What is an application's there, and a deployment's here.
SHARED = (
    "it is runtime_env of each deployment that the file names: give it to others, too; what the import needs is to be "
    "there where `dask serve deploy` runs"
)
UNNAMED = "runtime_env is an option of each deployment here: name them under `deployments`, or give it in the code"
APPLICATION_ELSEWHERE = {
    "logging_config": LOGGING,
    "autoscaling_policy": "a policy is that of one deployment, its autoscaling_config.policy, and is told nothing of "
    "others",
    "external_scaler_enabled": "serve.scale and `dask serve scale` need no leave",
}
HTTP = {
    "host": "host",
    "port": "port",
    "root_path": "root_path",
    "keep_alive_timeout_s": "keep_alive_timeout_s",
    "request_timeout_s": "request_timeout_s",
    "ssl_certfile": "tls_certificate",
    "ssl_keyfile": "tls_key",
    "ssl_ca_certs": "tls_client_ca",
}
HTTP_ELSEWHERE = {
    "ssl_keyfile_password": "write it to a file that only its owner may read, and name that with tls_key_password_file",
    "location": "proxies run beside the scheduler; num_proxies says how many",
    "num_cpus": "a proxy is a process beside the scheduler; it takes nothing of the workers",
    "middlewares": "give import paths with arguments to middleware",
}
#: Fields of autoscaling, as Ray called them before.
OLDER = {
    "target_num_ongoing_requests_per_replica": "target_ongoing_requests",
    "upscale_smoothing_factor": "upscaling_factor",
    "downscale_smoothing_factor": "downscaling_factor",
}
SCALING = {
    "metrics_interval_s": "loads are reported when they change; nothing is to be set",
    "look_back_period_s": "the load of this moment counts; upscale_delay_s and downscale_delay_s say for how long it "
    "must have been so",
    "aggregation_function": "the load of this moment counts",
}
DEFAULT_POLICY = "default_autoscaling_policy"
#: Options that mean the same under the same name.
SAME = (
    "max_ongoing_requests",
    "user_config",
    "graceful_shutdown_timeout_s",
    "health_check_period_s",
    "health_check_timeout_s",
)


#: Keys of an application; where there is one only, Ray's older files have them at the top.
APPLICATION = frozenset(
    {"name", "import_path", "route_prefix", "runtime_env", "args", "deployments", "autoscaling_policy"}
)
