-- Has a job that failed be tried again. ARGV: id, now. Answers 'done' or 'refused' and the job; nothing where there is none.
local id, job = ARGV[1], load(ARGV[1])
if not job then return {} end
if job[STATE] ~= 'd' then return { 'refused', told(id, job) } end
job[STATE], job[DUE], job[CLAIMS], job[ATTEMPTS], job[ENDED] = 'r', tonumber(ARGV[2]), 0, 0, 0
job[TRIALS], job[REVIVED] = 0, job[REVIVED] + 1
job[ACTIONS] = string.gsub(job[ACTIONS], 'f', 'w')
change(id, job, 'd')
return { 'done', told(id, job) }
