// An OpenID Connect provider for tests, on a free loopback port: accounts are whatever name is typed, their roles are
// set with PUT /test/roles, and GET /test/requests counts what was asked. Prints its issuer when it serves.
import { createServer } from 'node:http';
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

const require = createRequire(`${process.argv[2]}/`);
const { Provider } = await import(pathToFileURL(require.resolve('oidc-provider')));
const lifetime = Number(process.argv[3] ?? 3600);

const roles = {};
const requests = {};
const server = createServer();
await new Promise((resolve) => server.listen(Number(process.argv[4] ?? 0), '127.0.0.1', resolve));
const issuer = `http://127.0.0.1:${server.address().port}`;

const provider = new Provider(issuer, {
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
  jwks: JSON.parse(process.argv[5]),
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
});

const handle = provider.callback();
server.on('request', (request, response) => {
  const path = request.url.split('?')[0];
  if (path === '/test/requests') {
    response.end(JSON.stringify(requests));
  } else if (path === '/test/roles') {
    let text = '';
    request.on('data', (part) => { text += part; });
    request.on('end', () => { Object.assign(roles, JSON.parse(text)); response.end('{}'); });
  } else {
    requests[path] = (requests[path] ?? 0) + 1;
    handle(request, response);
  }
});
console.log(`serving ${issuer}`);
