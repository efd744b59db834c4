-- Writes a job as another store had it, unless there is one of its id. ARGV: id, body, then the fields of the job.
-- Answers 1 if it is new.
local id, job = ARGV[1], {}
if load(id) then return 0 end
for field = STATE, DEVICE do job[field] = ARGV[2 + field] end
for _, field in ipairs({ AT, DUE, FENCE, CLAIMS, ATTEMPTS, BEGUN, ENDED, TRIALS, REVIVED }) do job[field] = tonumber(job[field]) end
call('HSET', BODY, id, ARGV[2])
call('ZADD', IDS, 0, id)
change(id, job)
return 1
