-- Has a job that has not begun fire now. ARGV: id, now. Answers 'done' or 'refused' and the job; nothing where there is none.
local id, job = ARGV[1], load(ARGV[1])
if not job then return {} end
if job[STATE] ~= 'p' then return { 'refused', told(id, job) } end
job[AT], job[DUE], job[BY] = math.min(job[AT], tonumber(ARGV[2])), 0, ''
change(id, job, 'p')
return { 'done', told(id, job) }
