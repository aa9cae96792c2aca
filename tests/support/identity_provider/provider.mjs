// An OpenID Connect provider for tests, on a free loopback port: accounts are whatever name is typed, their roles are
// set with PUT /test/roles, GET /test/requests counts what was asked, PUT /test/keys replaces its keys, and PUT
// /test/pace makes polls of the device flow that come too early an error. Prints its issuer when it serves. Arguments:
// folder of its package, lifetime of tokens in seconds, port, keys, and with https {key, cert} in PEM.
import { createServer } from 'node:http';
import { createServer as createTlsServer } from 'node:https';
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

const require = createRequire(`${process.argv[2]}/`);
const { Provider, errors } = await import(pathToFileURL(require.resolve('oidc-provider')));
const lifetime = Number(process.argv[3] ?? 3600);

const roles = {};
const requests = {};
const tls = process.argv[6] ? JSON.parse(process.argv[6]) : null;
const server = tls ? createTlsServer(tls) : createServer();
await new Promise((resolve) => server.listen(Number(process.argv[4] ?? 0), '127.0.0.1', resolve));
const issuer = `${tls ? 'https' : 'http'}://127.0.0.1:${server.address().port}`;

const settings = {
  clients: [
    {
      client_id: 'dashboard',
      client_secret: 'test-secret-of-the-dashboard',
      application_type: 'native',
      grant_types: ['authorization_code'],
      response_types: ['code'],
      redirect_uris: ['http://127.0.0.1/login/oidc/callback'],
    },
    {
      client_id: 'command-line',
      token_endpoint_auth_method: 'none',
      application_type: 'native',
      grant_types: ['urn:ietf:params:oauth:grant-type:device_code', 'refresh_token'],
      response_types: [],
      redirect_uris: [],
    },
    {
      client_id: 'other',
      token_endpoint_auth_method: 'none',
      application_type: 'native',
      grant_types: ['urn:ietf:params:oauth:grant-type:device_code', 'refresh_token'],
      response_types: [],
      redirect_uris: [],
    },
  ],
  claims: { openid: ['sub', 'realm_access'] },
  conformIdTokenClaims: false,
  cookies: { keys: ['test'] },
  features: {
    deviceFlow: { enabled: true },
    revocation: { enabled: true },
    devInteractions: { enabled: true },
    resourceIndicators: {
      enabled: true,
      getResourceServerInfo: () => ({
        scope: 'api', accessTokenFormat: 'jwt', accessTokenTTL: lifetime, audience: 'https://qflare.test',
      }),
      useGrantedResource: () => true,
    },
  },
  extraTokenClaims: (ctx, token) => (
    token.accountId ? { realm_access: { roles: roles[token.accountId] ?? [] } } : undefined
  ),
  findAccount: (ctx, id) => ({
    accountId: id,
    claims: () => ({ sub: id, realm_access: { roles: roles[id] ?? [] } }),
  }),
  issueRefreshToken: () => true,
  pkce: { required: () => true },
  ttl: { IdToken: lifetime, AccessToken: lifetime, DeviceCode: 600, Grant: 3600, Interaction: 3600,
    RefreshToken: 3600, Session: 3600, AuthorizationCode: 60 },
};

const pace = { interval: 0, hurried: 0, polledAt: 0 };
async function keepPace(ctx, next) {
  const isPoll = ctx.path === '/token' && pace.interval > 0;
  const early = isPoll && Date.now() - pace.polledAt < pace.interval * 1000 - 200;
  if (isPoll) pace.polledAt = Date.now();
  if (early || (isPoll && pace.hurried === 0)) {
    // The first poll is one too early, whenever it comes; RFC 8628 lets the client then wait five seconds more.
    pace.hurried += 1;
    pace.interval += early ? 0 : 5;
    const error = new errors.SlowDown();
    ctx.status = error.statusCode;
    ctx.body = { error: error.error, error_description: error.error_description };
    return;
  }
  await next();
  if (ctx.path === '/device/auth' && pace.interval > 0 && ctx.body) ctx.body.interval = pace.interval;
}

let handle;
function serveWith(jwks) {
  const provider = new Provider(issuer, { ...settings, jwks });
  provider.use(keepPace);
  handle = provider.callback();
}
serveWith(JSON.parse(process.argv[5]));

function received(request, response, use) {
  let text = '';
  request.on('data', (part) => { text += part; });
  request.on('end', () => { use(JSON.parse(text)); response.end('{}'); });
}
server.on('request', (request, response) => {
  const path = request.url.split('?')[0];
  if (path === '/test/requests') {
    response.end(JSON.stringify(requests));
  } else if (path === '/test/roles') {
    received(request, response, (values) => Object.assign(roles, values));
  } else if (path === '/test/keys') {
    received(request, response, serveWith);
  } else if (path === '/test/pace' && request.method === 'GET') {
    response.end(JSON.stringify(pace));
  } else if (path === '/test/pace') {
    received(request, response, (values) => Object.assign(pace, values));
  } else {
    requests[path] = (requests[path] ?? 0) + 1;
    handle(request, response);
  }
});
console.log(`serving ${issuer}`);
