-- What an event does to a job. The last of KEYS: early:TOKEN. ARGV: id, token, c (cancels) or t (triggers), name of the event, its
-- id, when it came, up to when jobs are created for which it counts, 1 where it counts for jobs that are still to be written.
-- Answers 1: it did that, now or when it was driven before; 0: it did nothing; -1: the job is not there under this token. If it
-- is still to be written, it learns of the event then.
local id, does, name, event, at = ARGV[1], ARGV[3], ARGV[4], ARGV[4] .. '\0' .. ARGV[5], tonumber(ARGV[6])
local job = load(id)
if not job or job[TOKEN] ~= ARGV[2] then
  if ARGV[8] == '1' then
    call('SADD', KEYS[#KEYS], does .. name)
    call('PEXPIRE', KEYS[#KEYS], 600000)
  end
  return -1
end
if job[EVENT] == event then return 1 end
if job[STATE] ~= 'p' or (does == 't' and (job[AT] <= at or job[BY] == name)) then return 0 end
-- The time of its creation stands at the beginning of what never changes.
local body = call('HGET', BODY, id) or ''
if #body > 12 and struct.unpack('>I8', body, 6) > tonumber(ARGV[7]) then return 0 end
job[BY], job[EVENT] = name, event
if does == 'c' then
  finish(id, job, 'x', at)
else
  job[AT], job[DUE] = at, 0
  change(id, job, 'p')
end
return 1
