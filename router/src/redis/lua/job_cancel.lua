-- Cancels a job that has not begun. ARGV: id, now.
-- Answers 'done' or 'refused' and the job; nothing where there is none.
local id, job = ARGV[1], load(ARGV[1])
if not job then return {} end
if job[STATE] == 'p' then finish(id, job, 'x', tonumber(ARGV[2])) end
return { job[STATE] == 'x' and 'done' or 'refused', told(id, job) }
