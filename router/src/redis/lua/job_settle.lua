-- Ends a claim. ARGV: id, fence, the state it is in now (r between two attempts; as if it had not been claimed: p, or b where it was
-- begun), now, when it is due again, actions (where they do not fit: as before), error (empty: as before).
-- Answers 0 where the job was claimed again, or is gone; 1 also where this was done before.
local id, job, state, now = ARGV[1], load(ARGV[1]), ARGV[3], tonumber(ARGV[4])
if not job or int(job[FENCE]) ~= ARGV[2] then return 0 end
if job[STATE] ~= 'c' then return 1 end
if state == 'r' or state == 'd' then job[ATTEMPTS] = job[ATTEMPTS] + 1 end
if #ARGV[6] == #job[ACTIONS] then job[ACTIONS] = ARGV[6] end
if ARGV[7] ~= '' then job[ERROR] = ARGV[7] end
if state == 'f' then job[ACTIONS] = string.rep('d', #job[ACTIONS]) end
if OVER[state] then
  finish(id, job, state, now)
  return 1
end
if state == 'r' or state == 'b' then job[TRIALS] = 0 end
if state == 'p' or state == 'b' then
  job[CLAIMS] = job[CLAIMS] - 1
  state = (state == 'b' or job[BEGUN] == 1) and 'r' or 'p'
end
job[STATE], job[DUE], job[HOLDER] = state, tonumber(ARGV[5]), ''
change(id, job, 'c')
return 1
