-- wrk sends this body, as JSON, with every request.
wrk.method = "POST"
wrk.body = os.getenv("BENCHMARK_BODY")
wrk.headers["Content-Type"] = "application/json"
