-- Writes a job unless there is one of its id. The last of KEYS: early:TOKEN. ARGV: id, body, when it fires, actions, token, now,
-- 1 where there is no room; when the first of its names was registered by the clock of its server (0: it has none), what an event
-- that had come before does (c cancels, t triggers, or nothing), its name; the device that asks for it, if one does.
-- Answers 'done' (the body is left out), 'refused' (there is one) or 'again' (the names have to be registered again), and the job;
-- nothing where there is no room.
local id, at, token, now, registered = ARGV[1], tonumber(ARGV[3]), ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[8])
local job, does, by = load(id), ARGV[9], ARGV[10]
if job then return { 'refused', told(id, job) } end
if ARGV[7] == '1' then return {} end
if registered > 0 then
  -- Whoever drove an event and did not find the job has left a mark, which lasts much longer than this.
  if math.abs(now_us() / 1000 - registered) > 60000 then return { 'again' } end
  for _, mark in ipairs(call('SMEMBERS', KEYS[#KEYS])) do
    if does ~= 'c' then does, by = string.sub(mark, 1, 1), string.sub(mark, 2) end
  end
end
if does == 't' then at = math.min(at, now) end
job = { does == 'c' and 'x' or 'p', at, 0, 0, 0, 0, 0, token, by, '', does == 'c' and now or 0, ARGV[4], '', '', 0, 0, ARGV[11] }
call('HSET', BODY, id, ARGV[2])
call('ZADD', IDS, 0, id)
change(id, job)
return { 'done', told(id, job, '') }
