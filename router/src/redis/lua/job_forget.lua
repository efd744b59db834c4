-- Forgets a job that is over. ARGV: id, token.
local id, job = ARGV[1], load(ARGV[1])
if not job or not OVER[job[STATE]] or job[TOKEN] ~= ARGV[2] then return 0 end
call('ZREM', IDS, id)
call('HDEL', BODY, id)
call('HDEL', HEAD, id)
call('ZREM', IN .. job[STATE], id)
return 1
