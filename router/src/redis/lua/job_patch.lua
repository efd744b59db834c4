-- Changes a job that has not begun. ARGV: id, when it fires (empty: as before), plan (empty: as before), actions of the plan.
-- Answers 'done' or 'refused' and the job; nothing where there is none.
local id, job = ARGV[1], load(ARGV[1])
if not job then return {} end
if job[STATE] ~= 'p' then return { 'refused', told(id, job) } end
if ARGV[3] ~= '' then
  local body = call('HGET', BODY, id) or '\0\0\0\0'
  call('HSET', BODY, id, string.sub(body, 1, 4 + struct.unpack('>I4', body)) .. ARGV[3])
  job[ACTIONS] = ARGV[4]
end
if ARGV[2] ~= '' then job[AT], job[BY] = tonumber(ARGV[2]), '' end
change(id, job, 'p')
return { 'done', told(id, job) }
