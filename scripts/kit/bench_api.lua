-- Requests of scripts/bench for wrk. SETTINGS is written in front of this file: case, round, ids, bodies, headers,
-- paths, and ports where several servers are asked directly, each by some of the threads. Every body is a new one; every answer that is not a 200 is counted, and the first one shown.
local threads, numbers = {}, 0

function setup(thread)
  thread:set("number", numbers)
  local port = SETTINGS.ports[numbers % math.max(#SETTINGS.ports, 1) + 1]
  if port then thread.addr = wrk.lookup("127.0.0.1", port)[1] end
  numbers = numbers + 1
  table.insert(threads, thread)
end

local count, ids, base = 0, {}, 0
bad, shown = 0, ""

function init()
  base = os.time() * 1000
  if SETTINGS.ids then
    for id in io.lines(SETTINGS.ids) do ids[#ids + 1] = id end
  end
  -- Each thread goes its own way through them.
  count = number * math.floor(#ids / 2)
end

local function post(path, body)
  local headers = {["Content-Type"] = "application/json"}
  for name, value in pairs(SETTINGS.headers) do headers[name] = value end
  return wrk.format("POST", path, headers, body)
end

local cases = {}

cases["log-metric"] = function()
  -- Four runs a thread, as many writers as connections: each continues its own curve.
  local run = ids[number * 4 + count % 4 + 1]
  return post("/api/2.0/mlflow/runs/log-metric", string.format(
    '{"run_id":"%s","key":"loss","value":%.6f,"timestamp":%d,"step":%d}', run, 1 / (1 + count), base + count, count))
end

cases["log-batch"] = function()
  local metrics, params, tags = {}, {}, {}
  local key = SETTINGS.round .. "_" .. number .. "_" .. count
  for i = 1, 50 do
    metrics[i] = string.format('{"key":"m%s_%d","value":%.6f,"timestamp":%d,"step":0}', key, i, i / (1 + count), base)
  end
  for i = 1, 25 do
    params[i] = string.format('{"key":"p%s_%d","value":"%d"}', key, i, i * count)
    tags[i] = string.format('{"key":"t%s_%d","value":"word %d"}', key, i, i + count)
  end
  return post("/api/2.0/mlflow/runs/log-batch", string.format('{"run_id":"%s","metrics":[%s],"params":[%s],"tags":[%s]}',
    ids[count % #ids + 1], table.concat(metrics, ","), table.concat(params, ","), table.concat(tags, ",")))
end

cases["get experiment"] = function()
  return wrk.format("GET", "/api/2.0/mlflow/experiments/get?experiment_id=0", SETTINGS.headers)
end

cases["get run"] = function()
  return wrk.format("GET", "/api/2.0/mlflow/runs/get?run_id=" .. ids[count % #ids + 1], SETTINGS.headers)
end

cases["search"] = function()
  return post("/api/2.0/mlflow/runs/search", SETTINGS.bodies[count % #SETTINGS.bodies + 1])
end

cases["newest runs"] = function()
  return post("/api/2.0/mlflow/runs/search", SETTINGS.bodies[1])
end

cases["by a metric"] = function()
  return post("/api/2.0/mlflow/runs/search", SETTINGS.bodies[2])
end

cases["server info"] = function()
  return wrk.format("GET", "/api/3.0/mlflow/server-info", SETTINGS.headers)
end

cases["UI page"] = function()
  return wrk.format("GET", SETTINGS.paths[count % #SETTINGS.paths + 1], SETTINGS.headers)
end

local build = cases[SETTINGS.case]

function request()
  count = count + 1
  return build()
end

function response(status, headers, body)
  if status ~= 200 then
    bad = bad + 1
    if shown == "" then shown = status .. " " .. string.sub(body, 1, 300) end
  end
end

-- The assets' bodies need not come into this language: wrk itself counts what is no success.
if SETTINGS.case == "UI page" then response = nil end

function done(summary, latency, requests)
  local not200, first = summary.errors.status, ""
  for _, thread in ipairs(threads) do
    not200 = math.max(not200, 0) + (thread:get("bad") or 0)
    if first == "" then first = thread:get("shown") or "" end
  end
  io.write(string.format(
    'RESULT {"requests":%d,"seconds":%.3f,"bytes":%d,"p50_ms":%.3f,"p99_ms":%.3f,"worst_ms":%.3f,"not200":%d,"broken":%d}\n',
    summary.requests, summary.duration / 1e6, summary.bytes, latency:percentile(50) / 1000,
    latency:percentile(99) / 1000, latency.max / 1000, not200,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout))
  if first ~= "" then io.write("FIRST " .. first .. "\n") end
end
