-- What the functions of delayed jobs have in common; it stands before each of them.
--
-- KEYS: everything of a shard that is about its jobs: head, body, ids, devices, and the jobs in each state. They are named in every call, so that
-- Redis has it wait while the slot moves to another server, key by key. Times are Unix milliseconds and come with the call.
--
--   :head    hash, job id -> what changes about a job, see `load`
--   :body    hash, job id -> what was asked for: a length in 4 bytes, so many bytes that never change, the plan
--   :in:p    sorted set, jobs that wait by when they are due; so for each state; those that are over by when they ended
--   :ids     sorted set in order, all jobs
--   :devices hash, device -> how many of the jobs that it asked for have not ended
--   :early:TOKEN   set, events that a job learns of when it is written, see job_event_apply
--
-- States: p pending, c claimed, r between two attempts, f fired, d failed, x cancelled, s skipped.

local call = redis.call
local HEAD, BODY, IDS, DEVICES, BASE = KEYS[1], KEYS[2], KEYS[3], KEYS[4], string.sub(KEYS[1], 1, -5)
local IN = BASE .. 'in:'
local OVER = { f = true, d = true, x = true, s = true }

local function int(number) return string.format('%.0f', number) end

local function now_us()
  local time = call('TIME')
  return time[1] * 1000000 + time[2]
end

-- A job: its state; when it fires, or would have; when it may be claimed, once it has begun; the token of its newest claim; claims,
-- attempts and whether it had begun before, as the seam says; under which token its event names are registered; the name of the
-- event that cancelled or triggered it; which one that was, also when it does not count any more; when it ended; a letter for each
-- action (w waiting, d done, f failed); who has it; why an attempt failed; trials, and how often it was revived; which
-- device asked for it.
local STATE, AT, DUE, FENCE, CLAIMS, ATTEMPTS, BEGUN, TOKEN, BY, EVENT, ENDED, ACTIONS, HOLDER, ERROR, TRIALS, REVIVED, DEVICE =
  1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17

-- What was written before there were trials has fewer fields.
local function read(raw)
  local job = cmsgpack.unpack(raw)
  job[TRIALS], job[REVIVED], job[DEVICE] = job[TRIALS] or 0, job[REVIVED] or 0, job[DEVICE] or ''
  return job
end

local function load(id)
  local raw = call('HGET', HEAD, id)
  return raw and read(raw)
end

-- When a job may be claimed: while it waits not before its time, nor before it was put off to.
local function due_of(job)
  return job[STATE] == 'p' and math.max(job[AT], job[DUE]) or job[DUE]
end

-- By when a job is listed.
local function place_of(job)
  return OVER[job[STATE]] and job[ENDED] or due_of(job)
end

-- A job as the callers read it; `body` where that is known.
local function told(id, job, body)
  return { id, job[STATE], int(job[AT]), int(due_of(job)), int(job[FENCE]), job[CLAIMS],
    job[ATTEMPTS], job[BEGUN], job[TOKEN], job[BY], int(job[ENDED]), job[ACTIONS], job[HOLDER], job[ERROR],
    job[TRIALS], job[REVIVED], job[DEVICE], body or call('HGET', BODY, id) or '' }
end

-- When a job of a state may be claimed next.
local function first_of(state)
  return tonumber(call('ZRANGE', IN .. state, 0, 0, 'WITHSCORES')[2])
end

-- Lists a job where it belongs, and not where it was `before`.
local function place(id, job, before)
  if before and before ~= job[STATE] then call('ZREM', IN .. before, id) end
  call('ZADD', IN .. job[STATE], int(place_of(job)), id)
end

-- Tells whoever waits for the shard of a job that may be claimed earlier than any other.
local function tell(job)
  local due = place_of(job)
  for _, state in ipairs({ 'p', 'r', 'c' }) do
    local first = first_of(state)
    if first and first <= due then return end
  end
  redis.pcall('PUBLISH', BASE .. 'notice', int(due))
end

-- Writes what a job is now. A server that dies in between may bring half of it back: an index that the job contradicts is put right
-- when a claim comes across it, so where nobody would come across the job the index is first.
local function change(id, job, before)
  if not OVER[job[STATE]] then tell(job) end
  if not before or OVER[before] then call('ZADD', IN .. job[STATE], int(place_of(job)), id) end
  call('HSET', HEAD, id, cmsgpack.pack(job))
  if before then place(id, job, before) end
  local was_open, is_open = before and not OVER[before], not OVER[job[STATE]]
  if job[DEVICE] ~= '' and (was_open or false) ~= is_open then
    local count = call('HINCRBY', DEVICES, job[DEVICE], is_open and 1 or -1)
    if count <= 0 then call('HDEL', DEVICES, job[DEVICE]) end
  end
end

local function finish(id, job, state, now)
  local before = job[STATE]
  job[STATE], job[ENDED], job[HOLDER] = state, now, ''
  change(id, job, before)
end
