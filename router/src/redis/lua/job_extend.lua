-- Prolongs the lease of a claim. ARGV: id, fence, until when, actions, 1 for a trial. Answers 0 where the claim is not in force.
local id, job = ARGV[1], load(ARGV[1])
if not job or job[STATE] ~= 'c' or int(job[FENCE]) ~= ARGV[2] then return 0 end
job[DUE] = math.max(job[DUE], tonumber(ARGV[3]))
if #ARGV[4] == #job[ACTIONS] then job[ACTIONS] = ARGV[4] end
job[TRIALS] = job[TRIALS] + tonumber(ARGV[5])
change(id, job, 'c')
return 1
