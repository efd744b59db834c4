-- Prolongs the lease of a claim. ARGV: id, fence, until when, actions. Answers 0 where the claim is not in force.
local id, job = ARGV[1], load(ARGV[1])
if not job or job[STATE] ~= 'c' or int(job[FENCE]) ~= ARGV[2] then return 0 end
job[DUE] = math.max(job[DUE], tonumber(ARGV[3]))
if #ARGV[4] == #job[ACTIONS] then job[ACTIONS] = ARGV[4] end
change(id, job, 'c')
return 1
