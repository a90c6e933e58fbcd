"""What ``BatchStates`` does in one go, as Lua. Each may be sent again where its answer was lost."""

# KEYS: the batch, all open ones, the tenant's open ones, the tenant's list
CREATE = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 1 end
if redis.call('SCARD', KEYS[3]) >= tonumber(ARGV[4]) then return 0 end
redis.call('HSET', KEYS[1], 'record', ARGV[2], 'phase', 'reading')
redis.call('SADD', KEYS[2], ARGV[1])
redis.call('SADD', KEYS[3], ARGV[1])
redis.call('ZADD', KEYS[4], ARGV[3], ARGV[1])
return 1
"""
# ARGV: the step and its time as they were seen, the step to begin, now
BEGIN = """
local current = redis.call('HMGET', KEYS[1], 'step', 'step_ms')
if current[1] == ARGV[3] and current[2] == ARGV[4] then return 1 end
if (current[1] or '') ~= ARGV[1] or (current[2] or '0') ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], 'step', ARGV[3], 'step_ms', ARGV[4])
return 1
"""
# ARGV: the step and the phase as they were seen, '' for any phase; then fields and their values
SET = """
local current = redis.call('HMGET', KEYS[1], 'step', 'phase')
if (current[1] or '') ~= ARGV[1] then return 0 end
if ARGV[2] ~= '' and current[2] ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], 'step', '', 'problem', '', unpack(ARGV, 3))
return 1
"""
# ARGV: how it ends, now, seconds that workers are told to stop for
END = """
local known = redis.call('HMGET', KEYS[1], 'phase', 'ending')
if not known[1] then return 'missing' end
if known[1] == 'closing' or known[1] == 'assembling' or known[1] == 'over' then return known[1] end
if not known[2] or known[2] == '' then
  redis.call('HSET', KEYS[1], 'ending', ARGV[1], 'ending_ms', ARGV[2], 'step', '')
  redis.call('SET', KEYS[2], '1', 'EX', ARGV[3])
end
return 'ended'
"""
# ARGV: now, source, adapter, then line, prompt tokens, completion tokens, failed for each
MARK = """
local phase = redis.call('HGET', KEYS[1], 'phase')
if not phase or phase == 'over' then return -1 end
local fresh, failed, prompt, completion = 0, 0, 0, 0
for i = 4, #ARGV, 4 do
  if redis.call('SETBIT', KEYS[2], ARGV[i], 1) == 0 then
    fresh = fresh + 1
    prompt = prompt + ARGV[i + 1]
    completion = completion + ARGV[i + 2]
    failed = failed + ARGV[i + 3]
  end
end
if fresh > 0 then
  redis.call('HINCRBY', KEYS[1], 'done', fresh)
  redis.call('HINCRBY', KEYS[1], 'failed', failed)
  redis.call('HINCRBY', KEYS[1], 'prompt_tokens', prompt)
  redis.call('HINCRBY', KEYS[1], 'completion_tokens', completion)
  redis.call('HSET', KEYS[1], 'last_ms', ARGV[1])
  if ARGV[2] == 'worker' then redis.call('HINCRBY', KEYS[1], 'answered', fresh) end
  redis.call('HINCRBY', KEYS[3], ARGV[3], fresh)
end
return fresh
"""
