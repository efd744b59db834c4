-- Claims what is due, in the order of (due, id). ARGV: now, how many, when the leases end, who, how many bytes of bodies are enough.
-- Answers when something may be claimed next (nothing: there is nothing), then the jobs.
local now, limit, until_ms, bytes = ARGV[1], tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[5])

-- Whether `a` comes before `b`, byte by byte: strings compare as the locale says.
local function is_before(a, b)
  for i = 1, math.min(#a, #b) do
    local one, other = string.byte(a, i), string.byte(b, i)
    if one ~= other then return one < other end
  end
  return #a < #b
end

-- Of each state id and due in turn, and how far it was taken.
local runs = {}
for _, state in ipairs({ 'p', 'r', 'c' }) do
  local due = call('ZRANGEBYSCORE', IN .. state, '-inf', now, 'WITHSCORES', 'LIMIT', 0, limit)
  runs[#runs + 1] = { state = state, due = due, at = 1 }
end

local function take()
  local first
  for _, run in ipairs(runs) do
    run.id, run.score = run.due[run.at], tonumber(run.due[run.at + 1])
    if run.id and (not first or run.score < first.score or (run.score == first.score and is_before(run.id, first.id))) then
      first = run
    end
  end
  if first then first.at = first.at + 2 end
  return first
end

-- What changes is read and written at once for several: a call costs more than what it does. Not for too many: bodies may be large.
local CHUNK = 32
local fence, claimed = now_us(), {}

local function claim(chunk)
  local heads, bodies = {}, {}
  for i, run in ipairs(chunk) do heads[i] = run.id end
  bodies = call('HMGET', BODY, unpack(heads))
  heads = call('HMGET', HEAD, unpack(heads))
  local saved, placed, left = {}, {}, { p = {}, r = {}, c = {} }
  for i, taken in ipairs(chunk) do
    local id, job = taken.id, heads[i] and read(heads[i])
    if not job then
      call('ZREM', IN .. taken.state, id)
    elseif job[STATE] ~= taken.state or place_of(job) > tonumber(now) then
      -- What it is was written, where it belongs was not.
      place(id, job, taken.state)
    elseif bytes > 0 then
      if job[STATE] ~= 'p' then job[BEGUN] = 1 end
      job[STATE], job[FENCE], job[CLAIMS] = 'c', math.max(job[FENCE] + 1, fence), job[CLAIMS] + 1
      job[DUE], job[HOLDER] = tonumber(until_ms), ARGV[4]
      saved[#saved + 1], saved[#saved + 2] = id, cmsgpack.pack(job)
      placed[#placed + 1], placed[#placed + 2] = until_ms, id
      if taken.state ~= 'c' then table.insert(left[taken.state], id) end
      claimed[#claimed + 1] = told(id, job, bodies[i] or '')
      bytes = bytes - #(bodies[i] or '')
    end
  end
  if #saved == 0 then return end
  call('HSET', HEAD, unpack(saved))
  call('ZADD', IN .. 'c', unpack(placed))
  for state, ids in pairs(left) do
    if #ids > 0 then call('ZREM', IN .. state, unpack(ids)) end
  end
end

while #claimed < limit and bytes > 0 do
  local chunk = {}
  while #chunk < math.min(CHUNK, limit - #claimed) do
    local run = take()
    if not run then break end
    chunk[#chunk + 1] = { id = run.id, state = run.state }
  end
  if #chunk == 0 then break end
  claim(chunk)
end
local next
for _, state in ipairs({ 'p', 'r', 'c' }) do
  local first = first_of(state)
  if first and (not next or first < next) then next = first end
end
return { next and int(next) or false, claimed }
